"""FastUNet: the reference network's constructor, parameters and results, on fused operators."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checkpoint, dispatch, hub, ops
from .built import as_built
from .graph import Graphs, repeats
from .origin import Origin
from .plan import Plans
from .prepared import Prepared, cacheable, foldable, laid_out, prepare, wants_gradient
from .reference import UNet, center_crop
from .small import is_small
from .sources import parts

if TYPE_CHECKING:
    from typing_extensions import Self  # typing.Self is new in Python 3.11


class FastUNet(UNet):
    """A drop-in :class:`fastunet.reference.UNet`: same arguments, same state_dict, same function.

    (N, in_channels, H, W) of any strides -> logits (N, out_channels, H, W), channels_last.

    In eval mode without gradients the weights are laid out for the kernels once, with batch norm
    folded into them, or in 16 bits into factors beside them, and again whenever a parameter or
    running statistic changes. Changes are seen through the tensors' version counters: an optimiser
    step, ``load_state_dict``, ``copy_`` under ``no_grad`` all count. Writing in place through
    ``.data`` bypasses the counter; call :meth:`refresh` after it.

    On a GPU the work of such a pass is written down when a kind of input comes for the second time, and repeated after
    that (:mod:`fastunet.plan`). Call :meth:`refresh` after changing an attribute of a layer, such as a norm's ``eps``.

    Do not rely on forward hooks of inner modules: the operators take their parameters and pass them by. (Where a
    CPU runs the reference network, as in training and for small layers, they run.) So shard the network as a whole,
    ``fully_shard(model)``, not module by module.

    ``origin``: what :func:`fastunet.convert` recognised, of a converted model; else None.
    """

    origin: Origin | None = None

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> str | None:
        """Write a folder that :meth:`from_pretrained` reads: model.safetensors, config.json and a card.

        Needs huggingface_hub, whose ``ModelHubMixin.save_pretrained`` takes the other options.
        """
        return hub.save(self._save, self.config, Path(save_directory), **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload such a folder to the Hugging Face Hub and return its address; options as there."""
        return hub.push(self._save, self.config, repo_id, **options)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Self:
        """The model of a folder, or of a repository of the Hugging Face Hub, in eval mode.

        Needs huggingface_hub, whose ``ModelHubMixin.from_pretrained`` takes the options
        (``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``).

        Raises:
            WeightsError: (a ValueError) no such folder; its model.safetensors is missing or not FastUNet's.
        """
        path = hub.find(os.fspath(name), **options)
        config, state, origin = checkpoint.ours(*checkpoint.read(path), str(path))
        if config is None:
            raise checkpoint.WeightsError(f"{path}: expected a file that save_pretrained wrote; see fastunet.convert")
        checkpoint.check(config, state, str(path))
        model = cls.from_config(config)
        model.load_state_dict(state)
        model.origin = origin
        return model.eval()

    def _save(self, path: Path) -> None:
        checkpoint.save(self, path)

    @property
    def _prepared(self) -> dict[nn.Module, Prepared]:
        return self.__dict__.setdefault("_prepared_weights", {})

    @property
    def _plans(self) -> Plans:
        return self.__dict__.get("_plans_by_input") or self.__dict__.setdefault("_plans_by_input", Plans())

    def refresh(self) -> None:
        """Forget the prepared weights, and all that was made of them; the next forward prepares them anew."""
        self._prepared.clear()
        self._plans.clear()
        if self._graphs is not None:
            self._graphs.clear()

    @property
    def _graphs(self) -> Graphs | None:
        return self.__dict__.get("_captured_graphs")

    @contextlib.contextmanager
    def cuda_graph(self, limit: int = 8) -> Iterator[FastUNet]:
        """Within the block, the forward pass in eval mode replays a captured CUDA graph: one launch instead of dozens.

        The first input of each signature (shape, strides, dtype, device, autocast) is captured. A graph
        whose weights or running statistics have changed since is captured anew, by the rule of the
        class: call :meth:`refresh` after writing through ``.data``. In train mode, on a CPU, where
        gradients are wanted, under ``torch.compile``, where a mode looks on, in a process group and in a capture of
        the user's own, the forward pass is the usual one. (Such a capture lays the weights out in each replay, and so
        takes those of then.)

        Args:
            limit: how many signatures are kept, each with the memory of a forward pass.
        """
        before = self._graphs
        self.__dict__["_captured_graphs"] = Graphs(limit, before)
        try:
            yield self
        finally:
            self.__dict__["_captured_graphs"] = before

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastUNet:
        # .to(), .half(), .cuda() replace the parameters' memory without counting a version.
        self.refresh()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return _without_what_was_made(self.__dict__)

    def _replicate_for_data_parallel(self) -> Self:
        replica: Any = super()._replicate_for_data_parallel()
        replica.__dict__ = _without_what_was_made(replica.__dict__)
        return replica

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        if not repeats(x):
            return self._forward(x)
        (_, *layers), tensors = parts(self)
        if self.training or any(layer.training for layer in layers) or not cacheable(tensors):
            return self._forward(x)
        if self._graphs is not None:
            return self._graphs(self._forward, x, tensors, layers)

        def constants() -> list[Tensor] | None:
            plain = all(type(t) in (Tensor, nn.Parameter) for t in tensors)
            if not plain or any(map(_is_made_up, layers)) or self.runs_on_plain_torch(x):
                return None
            return [*tensors, *laid_out(self._prepared)]

        objects = [*layers, self.config, dispatch.table(x.device)]
        return self._plans(self._forward, x, tensors, objects, constants)

    def _forward(self, x: Tensor) -> Tensor:
        if self.runs_on_plain_torch(x):
            return super().forward(x).contiguous(memory_format=torch.channels_last)
        skips = []
        for down in self.downs:
            skip, x = self._stage(down.conv, x, pool=down.pool)
            skips.append(skip)
        x, _ = self._stage(self.bottleneck, x)
        joined = joins_head(self)
        for up in self.ups:
            x = self._up(up, x, skips.pop(), joined)
        if joined is None:
            return self.finish(ops.conv2d_relu(x, *self._weights(x, self.head), relu=False))
        conv, norm = joined
        act: Any = {"relu": True, "negative_slope": self.config.slope}
        weights = *self._weights(x, conv, norm), *self._weights(x, self.head)
        return self.finish(ops.conv2d_relu_head(x, *weights, **act))

    def runs_on_plain_torch(self, x: Tensor) -> bool:
        """Whether ``x``, as things are, goes through the reference's forward pass, without an operator of ours."""
        return (_in_eager_on_a_cpu(x) and self._is_left_to_plain_torch(x)) or not as_built(self)

    def _is_left_to_plain_torch(self, x: Tensor) -> bool:
        """Whether a CPU does better without the operators.

        Without padding the crops and copies between layers eat what channels_last gives. Norms want NCHW: instance
        norm copies channels_last maps there and back, which costs more than the layout gives; batch norm where it
        trains takes them as they are and sums over their pixels one by one, with up to 300 times the error. The
        operators' gradients save memory, and time on a GPU alone: a CPU took twice eager's for small maps. In
        inference they take some 0.05 ms of Python each, which small layers do not make good.
        """
        if self.config.padding == "valid" or self._sums_over_maps():
            return True
        if ops.is_watched():
            return False
        return self._is_small(x) or (torch.is_grad_enabled() and wants_gradient([x, *self.parameters()]))

    def _is_small(self, x: Tensor) -> bool:
        dtype = x.dtype
        if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
            dtype = torch.get_autocast_dtype("cpu")
        elif any(p.dtype != dtype for p in islice(self.parameters(), 1)):
            return False  # the operators say what they expected
        whole = all(type(side) is int for side in x.shape)  # a tracer's are not
        return whole and is_small(self.config, x.shape, dtype)

    def _sums_over_maps(self) -> bool:
        """Whether a norm sums over the map it is given, in its forward pass or for its gradients."""
        if self.config.norm != "batch":
            return self.config.norm == "instance"
        return any(_sums_over_its_map(module) for module in self.modules() if isinstance(module, nn.BatchNorm2d))

    def _stage(self, block: Any, x: Tensor, *, pool: Any = None) -> tuple[Tensor, Tensor]:
        """(feature, what ``pool`` makes of it)."""
        *first, (conv, norm) = _units(block.net)
        for unit in first:
            x = self._unit(*unit, x)
        if isinstance(pool, nn.MaxPool2d) and pool.kernel_size == (2, 2):
            return self._unit(conv, norm, x, pool=True)
        x = self._unit(conv, norm, x)
        return x, x if pool is None else pool(x)

    def _folds(self, conv: nn.Module, norm: nn.Module) -> bool:
        return self.config.order == "conv_norm_act" and foldable(conv, norm)

    def _unit(
        self, conv: Any, norm: Any, x: Tensor, skip: Tensor | None = None, pool: bool = False, **options: Any
    ) -> Any:
        """Convolution, norm and activation, of ``x`` or of ``x`` and its skip; what one operator can do, by one."""
        slope, norm_first = self.config.slope, self.config.order == "conv_norm_act"
        folded = norm if norm is not None and self._folds(conv, norm) else None
        apart = norm is not None and folded is None
        act: Any = {"relu": not (apart and norm_first), "negative_slope": slope}
        options["padding"] = "valid" if conv.padding == (0, 0) else "same"
        taken = None
        summed = apart and norm_first and _takes_statistics(norm)
        of_norm = _statistics_of(norm) if summed else {}
        if skip is None and summed:
            y, taken = ops.conv2d_moments(x, *self._weights(x, conv), stride=conv.stride, **of_norm, **options)
        elif skip is None:
            options |= {"pool": pool and not apart, "stride": conv.stride}
            y = ops.conv2d_relu(x, *self._weights(x, conv, folded), **act, **options)
        else:
            # The operator concatenates the upsampled map first; to it, the other order is a matter of weights.
            roll = x.shape[1] if self.config.concat == "skip_first" and skip.shape[1] else 0
            weights = self._weights(x, conv, folded, roll)
            if summed:
                y, taken = ops.upsample_concat_conv2d_moments(x, skip, *weights, **of_norm, **options)
            else:
                y = ops.upsample_concat_conv2d_relu(x, skip, *weights, **act, **options)
        if apart:
            y, pooled = _normed(norm, y, relu=norm_first, negative_slope=slope, pool=pool, taken=taken)
            return (y, pooled) if pool else y
        return y

    def _up(self, up: Any, x: Tensor, skip: Tensor, spared: Any) -> Tensor:
        """A decoder's level, but for the unit ``spared``."""
        corners, mode = self.config.align_corners, up.kind
        if mode == "transpose":
            x, mode = ops.conv_transpose2x2(x, *self._weights(x, up.up)), "none"
        elif mode == "bilinear_conv":
            # Interpolation weights sum to 1, so a 1x1 convolution commutes with it: a quarter of the work.
            x = ops.conv2d_relu(x, *self._weights(x, up.up[1]), relu=False)
            mode = "bilinear"
        elif mode == "nearest_conv":
            ((conv, norm),) = _units(up.up[1:])
            nothing = x.new_empty(x.shape[0], 0, 2 * x.shape[2], 2 * x.shape[3])  # of a skip, but the size
            x, mode = self._unit(conv, norm, x, nothing, mode="nearest"), "none"
        (conv, norm), *others = _units(up.conv.net)
        options = {"mode": mode, "align_corners": corners}
        if up.match == "center_crop":
            scale = 1 if mode == "none" else 2
            skip = center_crop(skip, scale * x.shape[2], scale * x.shape[3])
        else:
            options["match"] = up.match
        x = self._unit(conv, norm, x, skip, **options)
        for unit in others:
            if unit != spared:
                x = self._unit(*unit, x)
        return x

    def _weights(self, x: Tensor, conv: Any, norm: Any = None, roll: int = 0) -> tuple[Tensor, Tensor | None]:
        # Compiled code keeps none, and PyTorch 2.11's Dynamo cannot trace the look-up of those that are kept.
        kept = {} if torch.compiler.is_compiling() else self._prepared
        return prepare(kept, x, conv, norm, roll)


def _without_what_was_made(state: dict[str, Any]) -> dict[str, Any]:
    """Of a model's attributes those that copies, pickles and replicas get; they make the others of their own."""
    made = "_prepared_weights", "_plans_by_input", "_captured_graphs"
    return {name: value for name, value in state.items() if name not in made}


def _is_made_up(layer: nn.Module) -> bool:
    """Whether its weight is no parameter but made in each pass, of what nobody counts the versions of."""
    return isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and layer._parameters.get("weight") is None


def joins_head(network: FastUNet) -> tuple[Any, Any] | None:
    """(convolution, norm or None) of the last unit, if one operator can hold it and the head; else None.

    Of a decoder's level it is not the first, which reads the skip; it keeps the size of its map.
    """
    units = _units(network.ups[-1].get_submodule("conv.net").children()) if len(network.ups) else []
    if len(units) < 2:
        return None
    conv, norm = units[-1]
    keeps_size = conv.padding != (0, 0) and conv.stride == (1, 1)
    return (conv, norm) if keeps_size and (norm is None or network._folds(conv, norm)) else None


def _units(layers: Iterable[nn.Module]) -> list[tuple[Any, Any]]:
    """(3x3 convolution, norm or None) of each in a block's layers."""
    found: list[tuple[Any, Any]] = []
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            found.append((layer, None))
        elif isinstance(layer, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            found[-1] = (found[-1][0], layer)
    return found


def _normed(norm: Any, x: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """``norm(x)``, activated, and its max-pool; running statistics follow a batch that trains."""
    weights, options = (norm.weight, norm.bias), {"eps": norm.eps, **options}
    if isinstance(norm, nn.InstanceNorm2d):
        return ops.instance_norm_relu(x, *weights, **options)
    if not _takes_statistics(norm):
        options |= {"running_mean": norm.running_mean, "running_var": norm.running_var}
    y, pooled, mean, variance = ops.batch_norm_relu(x, *weights, **options)
    if norm.training and norm.track_running_stats:
        with torch.no_grad():
            share: Any = norm.momentum or 0.0
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
                share = 1 / norm.num_batches_tracked.to(mean.dtype) if norm.momentum is None else norm.momentum
            if norm.running_mean is not None and x.numel():
                for running, now in ((norm.running_mean, mean), (norm.running_var, variance)):
                    if running.dtype == now.dtype:
                        running.lerp_(now, share)
                    else:  # in float32: of float16 a variance may be out of range, and the average of it not
                        running.copy_(torch.lerp(running.to(now.dtype), now, share))
    return y, pooled


def _statistics_of(norm: Any) -> dict[str, Any]:
    """What the convolution before it is told of a norm that takes statistics of its map."""
    return {"eps": norm.eps, "per_image": isinstance(norm, nn.InstanceNorm2d)}


def _takes_statistics(norm: Any) -> bool:
    """Of the map that it is given; a batch norm in eval mode has its own."""
    return norm.training or norm.running_mean is None


def _sums_over_its_map(norm: Any) -> bool:
    """For statistics, or for the gradients of its parameters."""
    return _takes_statistics(norm) or wants_gradient([*norm.parameters()])


def _in_eager_on_a_cpu(x: Tensor) -> bool:
    """Where nobody asked for an implementation, so that it is PyTorch's; compiled code keeps to the operators."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and dispatch.asked_for() is None
