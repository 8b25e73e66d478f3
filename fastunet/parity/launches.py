"""The kernel launches of a network on tensors of its shapes, and what each must equal."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels, reference
from ..config import UNetConfig
from ..kernels import tuning
from ..ops.launchers import geometry_options
from ..trace import Layer, joins_head, takes_factors, trace

Config = tuning.ConvConfig | kernels.hopper.HopperConfig
Commuted = Literal["commuted", "hopper commuted"]
Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Launch:
    """One layer's kernel on tensors of its shapes, and what it must equal.

    Attributes:
        launcher: of :mod:`fastunet.kernels`; takes the tensors and, by name, the options.
        function: of :mod:`fastunet.reference`, or its gradient; takes the same tensors.
        configs: what the launcher may choose among on a device, by its capability; ``(None,)`` where
            it has no choice.
        hopper: the configurations of its Hopper sibling; empty where that cannot serve the layer.
        training: whether it is of a training step.
        gradient: of what, in a backward pass; empty in a forward pass.
        summed: of a result that is a sum over pixels, the map that is summed, from the same tensors.
        step: of :data:`fastunet.dispatch.STEPS`, whose implementation is chosen layer by layer; else empty.
        split: what of a result is compared, and what is wrong with the rest of it, if anything.
    """

    layer: Layer
    launcher: Callable[..., Any]
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]
    options: dict[str, Any]
    configs: Callable[[tuple[int, int]], tuple[Config | None, ...]]
    hopper: tuple[kernels.hopper.HopperConfig, ...] = ()
    training: bool = False
    gradient: str = ""
    summed: Callable[..., Tensor] | None = None
    step: str = ""
    split: Callable[[Any], tuple[Any, str]] = lambda result: (result, "")

    @property
    def name(self) -> str:
        what = f", gradient of {self.gradient}" if self.gradient else ", in training" if self.training else ""
        return self.layer.name + what

    def commuted(self, hopper: bool) -> tuple[Commuted, ...]:
        """The implementations that have its upsampling behind its products, with Hopper's if they are asked for."""
        if self.launcher is not kernels.upconcat_conv3x3_fwd or self.options["mode"] == "none" or self.layer.geometry:
            return ()
        return ("commuted", "hopper commuted") if hopper and self.hopper else ("commuted",)

    def run(self, config: Config | Commuted | None = None) -> Any:
        """Launch; without ``config`` the launcher chooses."""
        if isinstance(config, str):
            module = kernels if config == "commuted" else kernels.hopper
            return module.upconcat_conv3x3_commuted_fwd(*self.tensors, **self.options)
        if config is None:
            return self.launcher(*self.tensors, **self.options)
        launcher = self.launcher
        if isinstance(config, kernels.hopper.HopperConfig):
            launcher = getattr(kernels.hopper, launcher.__name__)
        return launcher(*self.tensors, **self.options, config=config)


def launches(
    config: UNetConfig, size: tuple[int, int, int], make: Make, *, tf32: bool = True, training: bool = False
) -> Iterator[Launch]:
    """The launches of a network's forward pass, in order; without gradients then its last two as one, if they can be.

    Args:
        size: (batch, height, width).
        make: ``make(*shape, fan_in=1)`` gives a tensor; all are of one dtype and device.
        tf32: round float32 operands to tf32.
        training: where gradients are wanted no batch norm is folded into its convolution.
    """
    batch, height, width = size
    layers, found = trace(config, height, width, batch), deque[Launch](maxlen=2)
    for layer in layers:
        mode = layer.mode
        corners = mode == "bilinear" and config.align_corners
        inputs, out = tuple(make(*shape) for shape in layer.in_shapes), layer.out_shape[1]
        channels = tuple(x.shape[1] for x in inputs)
        c, (h, w) = sum(channels), layer.out_shape[2:]
        precise = inputs[0].dtype == torch.float32 and not tf32
        folds = config.norm == "batch" and not training
        norm_follows = layer.norm is not None and config.order == "conv_norm_act" and not folds
        if norm_follows:  # a pass of its own, and the pool behind it
            layer = dataclasses.replace(layer, op=layer.op.removesuffix("_pool"))
        slope = 1.0 if norm_follows or layer.activation is None else config.slope
        options: dict[str, Any] = {"tf32": tf32}
        how = geometry_options(layer.stride, layer.padding)
        plain: dict[str, Any] = {"slope": slope, "padding": layer.padding}
        source, interpolating = (h, w), False
        if layer.op == "conv_transpose2x2":
            weight, bias = make(c, out, *layer.weight_shape[2:], fan_in=c), make(out)
            launcher, function = kernels.conv_transpose_fwd, reference.conv_transpose2x2
            source = inputs[0].shape[2:]
        else:
            side = layer.weight_shape[-1]
            weight, bias = make(out, c, side, side, fan_in=side * side * c), make(out)
            options |= {"slope": slope, **how}
            if layer.op == "upsample_concat_conv2d_relu":
                options |= {"mode": mode, "align_corners": corners}
                launcher, interpolating = kernels.upconcat_conv3x3_fwd, mode != "none"
                function = partial(reference.upsample_concat_conv2d_relu, mode=mode, align_corners=corners, **plain)
            elif layer.op == "conv2d_relu_pool":
                launcher = kernels.conv_pool_fwd
                function = partial(_conv_pool, **plain)
            else:
                stem = side == 3 and c <= kernels.STEM_CHANNELS
                launcher = kernels.stem_fwd if stem else kernels.conv_fwd
                function = partial(reference.conv2d_relu, stride=layer.stride, **plain)

        if launcher is kernels.stem_fwd:
            chooser = partial(_stem_configs, c, out, h, w, precise)
        else:
            shape, tma = (channels, out, *source, inputs[0].dtype), "stride" not in how
            chooser = partial(tuning.conv_configs, *shape, precise=precise, interpolating=interpolating, tma=tma)
        hopper = ()
        if launcher is not kernels.stem_fwd and not how:
            maps = tuple(tuple(x.shape) for x in inputs)
            hopper = kernels.hopper.layer_configs(
                layer.op, maps, tuple(weight.shape), weight.dtype, mode=mode, tf32=tf32
            )
        if not training and takes_factors(config, layer, weight.dtype):
            bias = torch.stack([make(out), bias]).float()
        tensors = (*inputs, weight, bias)
        found.append(
            Launch(layer, launcher, function, tensors, options, chooser, hopper, training=training, step="forward")
        )
        yield found[-1]
    if not training and joins_head(config, layers):
        yield from _with_head(*found)


def _with_head(conv: Launch, head: Launch) -> Iterator[Launch]:
    """The last two of a network as one launch, if a tile holds all the channels between."""
    x, weight, bias = conv.tensors
    if len(head.tensors[1]) > tuning.HEAD_CLASSES or len(weight) > tuning.HEAD_CHANNELS:
        return
    layer = dataclasses.replace(
        conv.layer,
        name=f"{conv.layer.name} with {head.layer.name}",
        op="conv2d_relu_head",
    )
    tf32, function = conv.options["tf32"], partial(_conv_head, slope=conv.options["slope"])
    shape, precise = ((x.shape[1],), len(weight), *x.shape[2:], x.dtype), x.dtype == torch.float32 and not tf32
    chooser = partial(tuning.conv_configs, *shape, precise=precise, whole=True)
    hopper = kernels.hopper.layer_configs(layer.op, (tuple(x.shape),), tuple(weight.shape), x.dtype, tf32=tf32)
    tensors = (*conv.tensors, *head.tensors[1:])
    yield Launch(layer, kernels.conv_head_fwd, function, tensors, conv.options, chooser, hopper, step="forward")


def with_moments(launch: Launch) -> Iterator[Launch]:
    """What Hopper makes of a layer before a norm, in training: its map and statistics, of the batch and of images."""
    name = {kernels.conv_fwd: "conv_moments_fwd", kernels.upconcat_conv3x3_fwd: "upconcat_conv3x3_moments_fwd"}
    if launch.layer.norm is None or launch.options.get("slope") != 1 or not launch.hopper:
        return
    options = {key: value for key, value in launch.options.items() if key != "slope"}
    for per_image in (False, True):
        of_norm = {"eps": 1e-5, "per_image": per_image}
        yield dataclasses.replace(
            launch,
            launcher=getattr(kernels, name[launch.launcher]),
            split=partial(_without_statistics, **of_norm),
            options=options | of_norm,
            configs=lambda capability: (),
        )


def _without_statistics(result: tuple[Tensor, ...], eps: float, per_image: bool) -> tuple[Tensor, str]:
    """The map; its statistics are held against it, as it is."""
    y, *found = result
    variance, mean = torch.var_mean(y.double(), (2, 3) if per_image else (0, 2, 3), correction=0)
    count = y.numel() / mean.numel()
    exact = {"mean": mean, "rstd": torch.rsqrt(variance + eps), "variance": variance * count / (count - 1)}
    for mine, (name, true) in zip(found, exact.items(), strict=True):
        if not torch.allclose(mine.double(), true, rtol=1e-4, atol=1e-4):
            return y, f"{name} is off by {(mine - true).abs().max():.1e}"
    return y, ""


def _stem_configs(
    channels: int, out: int, height: int, width: int, precise: bool, capability: tuple[int, int]
) -> tuple[tuning.ConvConfig, ...]:
    return (tuning.stem_config(channels, out, height, width, precise=precise),)  # the same on every device


def _conv_head(x: Tensor, weight: Tensor, bias: Tensor, head: Tensor, head_bias: Tensor, *, slope: float) -> Tensor:
    return F.conv2d(reference.conv2d_relu(x, weight, bias, slope), head, head_bias)


def _conv_pool(x: Tensor, weight: Tensor, bias: Tensor, **plain: Any) -> tuple[Tensor, Tensor]:
    y = reference.conv2d_relu(x, weight, bias, **plain)
    return y, F.max_pool2d(y, 2)


# --- the backward pass -----------------------------------------------------------------------


def gradients(launch: Launch, make: Make, *, tf32: bool = True) -> Iterator[Launch]:
    """The launches of the backward pass of one layer, whose forward launch in training is given.

    Args:
        make, tf32: as in :func:`launches`.
    """
    layer, options = launch.layer, {"tf32": tf32}
    if layer.op == "conv2d_relu_head":  # of inference alone
        return
    *sources, weight, _ = launch.tensors
    grad = make(*layer.out_shape)
    n, o, h, w = grad.shape
    precise = grad.dtype == torch.float32 and not tf32

    def through(launcher: Any, function: Any, tensors: tuple[Tensor, ...], of: str, **more: Any) -> Launch:
        return Launch(layer, launcher, function, tensors, more.pop("options", {}), more.pop("configs", _no_choice),
                      gradient=of, **more)  # fmt: skip

    def tiles(channels: tuple[int, ...], out: int, height: int, width: int) -> Any:
        return partial(tuning.conv_configs, channels, out, height, width, grad.dtype, precise=precise)

    # The map before the activation, and the bias.
    slope = launch.options.get("slope", 1.0)
    maps = (grad, make(*grad.shape))
    if layer.op == "conv2d_relu_pool":
        maps += (make(n, o, h // 2, w // 2),)
    before, activation = partial(_before_activation, slope=slope), {"slope": slope}
    changes = slope != 1 or len(maps) > 2  # else the bias comes with the weight
    if changes:
        yield through(_activation_kernel, before, maps, "the sums before its activation", options=activation)
        yield through(
            _bias_kernel, lambda *t: before(*t).sum((0, 2, 3)), maps, "the bias", options=activation, summed=before
        )

    if layer.op == "conv_transpose2x2":
        (x,), (rows, columns) = sources, weight.shape[2:]
        strided = partial(F.conv2d, stride=(rows, columns))
        read = (columns * o, columns * o) if rows == 2 else (rows * columns * o,)
        yield through(
            kernels.conv_transpose_dgrad, strided, (grad, weight), "the input",
            options=options, configs=tiles(read, x.shape[1], *x.shape[2:]), step="dgrad",
        )  # fmt: skip
        yield through(
            lambda *t, **o: kernels.conv_transpose_wgrad(*t, bias=True, **o)[0],
            lambda grad, x: _vjp(lambda weight: strided(grad, weight), weight.to(x.dtype), x),
            (grad, x), "the weight", options=options, step="wgrad",
        )  # fmt: skip
        yield through(
            lambda *t, **o: kernels.conv_transpose_wgrad(*t, bias=True, **o)[1], _pixel_sums,
            (grad, x), "the bias", options=options, summed=_first,
        )  # fmt: skip
        return

    mode, side = launch.options.get("mode", "none"), weight.shape[-1]
    size, pad = (sources[-1].shape[2], sources[-1].shape[3]), side // 2 if layer.padding == "same" else 0
    if mode != "none":
        small = sources[0]
        corners = {"align_corners": launch.options["align_corners"]}
        sources[0] = make(n, small.shape[1], *size)
        upsampling = partial(_upsampled, mode=mode, height=size[0], width=size[1], **corners)
        yield through(
            partial(kernels.upsample_fwd, height=size[0], width=size[1], mode=mode, **corners), upsampling, (small,),
            "the weight: its input upsampled again",
        )  # fmt: skip
        yield through(
            partial(kernels.upsample_bwd, height=small.shape[2], width=small.shape[3], mode=mode, **corners),
            lambda grad: _vjp(upsampling, grad.new_zeros(small.shape), grad), (make(*sources[0].shape),),
            "the map before upsampling",
        )  # fmt: skip
    names = ["the input"] if len(sources) == 1 else ["the upsampled map", "the skip"]
    if not sources[-1].shape[1]:  # no skip comes in
        sources, names = sources[:1], names[:1]
    geometry: Any = {"stride": layer.stride, "pad": pad, "size": size}
    both = partial(_wgrad_kernel, ksize=side, bias=not changes, **geometry)
    of_weight = partial(_weight_gradient, weight=weight, stride=layer.stride, pad=pad)
    yield through(
        lambda *t, **o: both(*t, **o)[0], of_weight, (grad, *sources), "the weight", options=options, step="wgrad"
    )
    if not changes:
        yield through(
            lambda *t, **o: both(*t, **o)[1], _pixel_sums, (grad, *sources), "the bias", options=options, summed=_first
        )
    first = 0
    for x, of in zip(sources, names, strict=True):
        c = x.shape[1]
        tensors, cells = (
            (grad, weight[:, first : first + c]),
            (-(-s // t) for s, t in zip(size, layer.stride, strict=True)),
        )
        of_input = partial(_input_gradient, shape=(n, c, *size), stride=layer.stride, pad=pad)
        hopper = ()
        if not layer.geometry:
            of_conv = "conv2d_relu", ((n, o, *size),), (c, o, side, side), grad.dtype
            hopper = kernels.hopper.layer_configs(*of_conv, tf32=tf32)[:1]  # the one that it chooses
        yield through(
            kernels.conv_dgrad, of_input, tensors, of, hopper=hopper,
            options=options | (geometry if layer.geometry else {}), configs=tiles((o,), c, *cells), step="dgrad",
        )  # fmt: skip
        first += c


def _no_choice(capability: tuple[int, int]) -> tuple[None]:
    return (None,)


def _activation_kernel(grad: Tensor, y: Tensor, pooled: Tensor | None = None, *, slope: float) -> Tensor:
    return kernels.activation_bwd(grad, pooled, y, slope=slope, bias=True)[0]


def _bias_kernel(grad: Tensor, y: Tensor, pooled: Tensor | None = None, *, slope: float) -> Tensor | None:
    return kernels.activation_bwd(grad, pooled, y, slope=slope, bias=True)[1]


def _before_activation(grad: Tensor, y: Tensor, pooled: Tensor | None = None, *, slope: float) -> Tensor:
    """The gradient before the activation, at whose sign y is, and a max-pool."""
    if pooled is not None:
        grad = grad + _vjp(lambda y: F.max_pool2d(y, 2), y, pooled)
    return _vjp(lambda y: reference.activate_(y.clone(), slope), y, grad)


def _wgrad_kernel(grad: Tensor, *sources: Tensor, ksize: int, **options: Any) -> tuple[Tensor, Tensor | None]:
    return kernels.conv_wgrad(grad, sources, ksize, **options)


def _first(grad: Tensor, *_: Tensor) -> Tensor:
    return grad


def _pixel_sums(grad: Tensor, *_: Tensor) -> Tensor:
    return grad.sum((0, 2, 3))


def _input_gradient(
    grad: Tensor, weight: Tensor, *, shape: tuple[int, ...], stride: tuple[int, int], pad: int
) -> Tensor:
    x = grad.new_empty(1).expand(shape)  # only its shape is asked for
    options = stride, [pad, pad], [1, 1], False, [0, 0], 1, [True, False, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *options)[0]


def _weight_gradient(
    grad: Tensor, x: Tensor, skip: Tensor | None = None, *, weight: Tensor, stride: tuple[int, int], pad: int
) -> Tensor:
    """Of each source by itself, which is what is chosen between; nothing is concatenated but the results."""
    sources = [x] if skip is None else [reference.pad_to(x, *skip.shape[2:]), skip]
    parts = weight.to(grad.dtype).split([source.shape[1] for source in sources], 1)
    options = stride, [pad, pad], [1, 1], False, [0, 0], 1, [False, True, False]
    found = [
        torch.ops.aten.convolution_backward(grad, source, part, None, *options)[1]
        for source, part in zip(sources, parts, strict=True)
    ]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _upsampled(x: Tensor, *, mode: str, align_corners: bool, height: int, width: int) -> Tensor:
    return reference.pad_to(reference.upsample(x, mode, align_corners), height, width)


def _vjp(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """Gradient of ``x`` through ``function``."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, grad)[0]
