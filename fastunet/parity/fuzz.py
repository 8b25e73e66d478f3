"""Random networks through :func:`fastunet.verify`, and the smallest that fails.

Hypothesis draws the cases and, where one fails, looks for a simpler one that fails too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch
from ..config import ACTIVATION, NORM, UPSAMPLE, UNetConfig
from ..model import FastUNet
from ..reference import UNet
from ..trace import trace
from .harness import verify
from .report import Check, Comparison, Report

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("contiguous", "channels_last", "strided", "transposed", "expanded")
# Powers of 2 by which weights, and inputs, may be scaled: with both, and room for sums in forward and
# backward, float16 reaches its ends at 2**-24 and 2**16, the others theirs beyond 2**-126 and 2**127.
_ROOM = {"float16": 5, "bfloat16": 56, "float32": 56}
_NEGATIVE_SLOPES = (0.01, 0.2, 0.99)
_NARROW = 12
_SIDE = 40  # pixels, that a map may have which could be smaller
# A variance over fewer pixels may be so small that the norm blows up every rounding before it. So does
# one far below the norm's eps of 1e-5: what it lets through is a constant, of which the next norm leaves roundings.
_PIXELS_OF_A_VARIANCE = 32
_ROOM_OF_A_VARIANCE = 4


@dataclass(frozen=True)
class Case:
    """One random check; equal cases are equal to the bit.

    Attributes:
        network: its shape.
        training: train mode, where batch norm takes the batch's statistics.
        batch, height, width, layout: of the inputs. ``layout`` is one of ``LAYOUTS``.
        dtype: a key of ``DTYPES``.
        weight_scale: log2 of the factor on the first of a level's convolutions, and of its inverse
            on the last, where there are two or more.
        input_scale: log2 of the factor on the inputs.
        seed: of weights and inputs.
    """

    network: UNetConfig
    training: bool
    batch: int
    height: int
    width: int
    layout: str
    dtype: str
    weight_scale: int
    input_scale: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """What is not as by default in ``network``, and all else."""
        return {**vars(self), "network": self.network.changes()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The case that :meth:`to_json` wrote.

        Raises:
            ValueError: another text; says what was expected.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        values = json.loads(text)
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError(f"expected an object with {', '.join(sorted(names))}, got {text}")
        if values["dtype"] not in DTYPES or values["layout"] not in LAYOUTS:
            raise ValueError(f"expected a dtype of {tuple(DTYPES)} and a layout of {LAYOUTS}, got {text}")
        case = cls(**{**values, "network": UNetConfig.from_json(json.dumps(values["network"]))})
        whole = ("batch", "height", "width", "weight_scale", "input_scale", "seed")
        if any(type(values[name]) is not int for name in whole) or type(values["training"]) is not bool:
            raise ValueError(f"expected integers for {', '.join(whole)} and a truth value for training, got {text}")
        if case.seed < 0:
            raise ValueError(f"expected a seed of at least 0, got {text}")
        trace(case.network, case.height, case.width, case.batch)  # raises on sizes that the network does not take
        return case

    def inputs(self, device: str) -> Tensor:
        """(N, C, H, W), of this case's dtype and strides."""
        shape = (self.batch, self.network.in_channels, self.height, self.width)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)) * 2.0**self.input_scale
        x = x.to(device, DTYPES[self.dtype])
        if self.layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if self.layout == "strided":  # every second pixel of every second channel, from an odd address
            n, c, h, w = shape
            return x.new_empty(n * 2 * c * h * 2 * w + 1)[1:].view(n, 2 * c, h, 2 * w)[:, ::2, :, ::2].copy_(x)
        if self.layout == "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        return x[:1].expand(shape) if self.layout == "expanded" else x

    def networks(self, device: str) -> tuple[FastUNet, UNet]:
        """A model and a reference of the same weights, in float32."""
        config = self.network
        model = FastUNet.from_config(config)
        randomise(model, self.seed + 1)
        with torch.no_grad():
            for layer in trace(config, self.height, self.width):
                module: Any = model.get_submodule(layer.name)
                # log2 of the factor on the weight, and on the map that comes of it.
                factor, scale = self._scales(layer.name)
                module.weight.mul_(2.0**factor)
                # A bias far larger than what it is added to makes a constant map.
                if module.bias is not None:
                    module.bias.mul_(2.0**scale)
        plain = UNet.from_config(config)
        plain.load_state_dict(model.state_dict())
        return model.to(device).train(self.training), plain.to(device).train(self.training)

    def _scales(self, name: str) -> tuple[int, int]:
        """log2 of the factor on a layer's weight, and on the map that comes of it."""
        kind, _, rest = name.partition(".")
        factor = within = 0  # of the layer, and of the maps between those of its level
        if ".net." in name:
            config, last = self.network, 0
            if kind == "ups":
                last = config.convs_up(config.depth - 1 - int(rest.partition(".")[0])) - 1
            else:
                last = config.convs_down(int(rest.partition(".")[0]) if kind == "downs" else config.depth) - 1
            index = int(name.rpartition(".")[2]) // (2 if config.norm is None else 3)
            if last:
                factor = {0: self.weight_scale, last: -self.weight_scale}.get(index, 0)
                within = 0 if index == last else self.weight_scale
        if self.network.norm is None:
            return factor, self.input_scale + within
        # Behind a norm it is taken for 1, which one of running statistics does not promise.
        return factor, factor + (self.input_scale if name == "downs.0.conv.net.0" else 0)

    def check(self, device: str, on_result: Callable[[Comparison | Check], None] = lambda result: None) -> Report:
        """:func:`fastunet.verify` of this case; in the interpreter, where a run takes a second, the forward alone."""
        once = _interpreted(device)
        networks, x = self.networks(device), self.inputs(device)
        return verify(
            *networks, x, dtype=DTYPES[self.dtype], gradients=not once, deterministic=not once, on_result=on_result
        )


@torch.no_grad()
def randomise(model: UNet, seed: int) -> None:
    """Weights that keep the size of what goes through, and norms that are not the identity, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            fan_in = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_channels
            module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
        elif isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            module.weight.uniform_(-1.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.5, generator=generator)
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)


@dataclass(frozen=True)
class Fuzzed:
    """What :func:`fuzz` found: how many cases passed, and the simplest that did not, with its report or error."""

    passed: int
    case: Case | None = None
    finding: Report | Exception | None = None


class _Broken(Exception):
    """A report that does not hold."""


def _interpreted(device: str) -> bool:
    """Whether kernels run in Triton's interpreter, which takes a second for a CPU's millisecond."""
    return device == "cpu" and dispatch.choose(torch.device(device), torch.float32).implementation == "triton"


def _draw_network(draw: Callable, widths: Any, deepest: int, most_convs: int) -> UNetConfig:
    """Any network, of 2 to ``deepest`` levels and 1 to ``most_convs`` convolutions in each.

    ``widths``, one of Hypothesis's strategies, are those of the encoder.
    """
    from hypothesis import strategies as st

    norm = draw(st.sampled_from(NORM))
    # A level less where maps must be larger: a CPU's float16 takes its time.
    features = tuple(draw(st.lists(widths, min_size=2, max_size=deepest - (norm == "instance" and deepest > 3))))
    depth = len(features) - 1
    upsample = draw(st.sampled_from(UPSAMPLE))
    downsample = draw(st.sampled_from(("max_pool", "stride")))
    match = draw(st.sampled_from(("zero_pad", "replicate_pad", "center_crop")))
    may_be_valid = (downsample, match) == ("max_pool", "center_crop")

    def levels(each: Any, count: int = depth) -> Any:
        return draw(st.none() | st.tuples(*[each] * count))

    narrow, convs = st.integers(1, _NARROW), st.integers(1, most_convs)
    step = st.integers(1, 3 if depth < 3 else 2)  # or the smallest input had thousands of pixels
    learned = {"bilinear_conv": st.none() | narrow, "nearest_conv": narrow, "transpose": narrow}
    return UNetConfig(
        in_channels=draw(st.integers(1, 5)),
        out_channels=draw(st.integers(1, 4)),
        features=features,
        upsample=upsample,
        align_corners=draw(st.booleans()),
        norm=norm,
        activation=draw(st.sampled_from(ACTIVATION)),
        negative_slope=draw(st.sampled_from(_NEGATIVE_SLOPES)),
        decoder_features=levels(st.tuples(narrow, narrow)),
        up_features=levels(learned[upsample]) if upsample in learned else None,
        encoder_convs=levels(convs, depth + 1),
        decoder_convs=levels(convs),
        downsample=downsample,
        strides=levels(st.tuples(step, step)) if upsample == "transpose" else None,
        concat=draw(st.sampled_from(("upsampled_first", "skip_first"))),
        match=match,
        padding=draw(st.sampled_from(("same", "valid"))) if may_be_valid else "same",
        order=draw(st.sampled_from(("conv_norm_act", "conv_act_norm"))),
        conv_bias=draw(st.sampled_from((True, False))),
        norm_eps=draw(st.sampled_from((1e-5, 1e-3))),
        norm_momentum=draw(st.sampled_from((0.1, 0.01))),
        final_activation=draw(st.sampled_from((None, "sigmoid"))),
    )


def _smallest_map(config: UNetConfig, height: int, width: int) -> int:
    """Pixels of the smallest map behind a level's convolutions."""
    sides = zip(*(sum(config.sides(size, axis), []) for axis, size in enumerate((height, width))), strict=True)
    return min(h * w for h, w in sides)


def fuzz(
    count: int, seed: int, device: str = "cpu", on_progress: Callable[[Fuzzed], None] = lambda so_far: None
) -> Fuzzed:
    """Check ``count`` random cases; the first that fails is made as simple as it can be.

    Args:
        seed: the same seed draws the same cases (with the same version of Hypothesis).
        on_progress: called with what is known after each passing case, and each simpler failing one.

    Raises:
        ImportError: Hypothesis is not installed.
    """
    import hypothesis
    from hypothesis import strategies as st
    from hypothesis.errors import Flaky

    levels, largest, most = (2, 2, 2) if _interpreted(device) else (4, 4, 3)

    @st.composite
    def cases(draw: Callable) -> Case:
        # One range, which Hypothesis walks down, of widths below and beyond a tile of 16.
        widths = st.integers(1, 36).map(lambda n: n if n <= _NARROW else n + 4)
        if _interpreted(device):
            # Several steps of a kernel's loop, whole ones and not: they take their time, and are not for every case.
            widths = st.integers(1, _NARROW)
            widths = st.sampled_from((48, 65)) | widths if draw(st.integers(0, 15)) == 15 else widths
        config = _draw_network(draw, widths, levels, most)
        norm = config.norm
        dtype = draw(st.sampled_from(list(DTYPES)))
        training = norm == "batch" and draw(st.booleans())
        batch = draw(st.integers(1, most))
        steps = config.reductions if config.downsample == "stride" else (1, 1)
        least = [-(-config.minimum_size // step) * step for step in steps]
        more = [min((largest - 1) * config.reduction, max(0, _SIDE - size)) for size in least]
        height, width = (
            size + step * draw(st.integers(0, room // step))
            for size, step, room in zip(least, steps, more, strict=True)
        )
        # A norm squares what comes to it.
        room = _ROOM[dtype] // (1 if norm is None or dtype == "float16" else 2)
        scales = weight_scales = st.integers(-room, room)
        if norm == "instance" or training:
            scales = st.integers(-_ROOM_OF_A_VARIANCE, room)
            weight_scales = st.integers(-_ROOM_OF_A_VARIANCE, _ROOM_OF_A_VARIANCE)
            if _smallest_map(config, height, width) * (batch if training else 1) < _PIXELS_OF_A_VARIANCE:
                while _smallest_map(config, height, width) < _PIXELS_OF_A_VARIANCE:
                    height, width = height + steps[0], width + steps[1]
                batch = 1
        return Case(
            network=config,
            training=training,
            batch=batch,
            height=height,
            width=width,
            layout=draw(st.sampled_from(LAYOUTS)),
            dtype=dtype,
            weight_scale=draw(weight_scales),
            input_scale=draw(scales),
            seed=draw(st.integers(0, 2**31)),
        )

    passed = 0
    failed: Fuzzed | None = None

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    @hypothesis.given(cases())
    def run(case: Case) -> None:
        nonlocal passed, failed
        try:
            finding: Report | Exception = case.check(device)
        except Exception as error:  # a crash is a finding too
            finding = error
        if isinstance(finding, Report) and finding.ok:
            if failed is None:
                passed += 1
                on_progress(Fuzzed(passed))
            return
        failed = Fuzzed(passed, case, finding)  # the last one that Hypothesis tries is the simplest
        on_progress(failed)
        raise _Broken

    try:
        run()
    except (_Broken, Flaky):
        assert failed is not None
        return failed
    return Fuzzed(passed)
