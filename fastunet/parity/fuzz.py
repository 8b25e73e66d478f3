"""Random networks through :func:`fastunet.verify`, and the smallest that fails.

Hypothesis draws the cases and, where one fails, looks for a simpler one that fails too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import dispatch
from ..config import ACTIVATION, NORM, UPSAMPLE, UNetConfig
from ..model import FastUNet
from ..reference import UNet
from .harness import verify
from .report import Check, Comparison, Report

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("contiguous", "channels_last", "strided", "transposed", "expanded")
# Powers of 2 by which weights, and inputs, may be scaled: with both, and room for sums in forward and
# backward, float16 reaches its ends at 2**-24 and 2**16, the others theirs beyond 2**-126 and 2**127.
_ROOM = {"float16": 5, "bfloat16": 56, "float32": 56}
_NEGATIVE_SLOPES = (0.01, 0.2, 0.99)
# A variance over fewer pixels may be so small that the norm blows up every rounding before it. So does
# one far below the norm's eps of 1e-5: what it lets through is a constant, of which the next norm leaves roundings.
_PIXELS_OF_A_VARIANCE = 32
_ROOM_OF_A_VARIANCE = 4


@dataclass(frozen=True)
class Case:
    """One random check; equal cases are equal to the bit.

    Attributes:
        in_channels ... decoder_features: of the network, as :class:`fastunet.UNetConfig` has them.
        training: train mode, where batch norm takes the batch's statistics.
        batch, height, width, layout: of the inputs. ``layout`` is one of ``LAYOUTS``.
        dtype: a key of ``DTYPES``.
        weight_scale: log2 of the factor on every first convolution of a pair, and of its inverse
            on every second.
        input_scale: log2 of the factor on the inputs.
        seed: of weights and inputs.
    """

    in_channels: int
    out_channels: int
    features: tuple[int, ...]
    upsample: str
    align_corners: bool
    norm: str | None
    activation: str
    negative_slope: float
    decoder_features: tuple[tuple[int, int], ...] | None
    training: bool
    batch: int
    height: int
    width: int
    layout: str
    dtype: str
    weight_scale: int
    input_scale: int
    seed: int

    @property
    def config(self) -> UNetConfig:
        names = {field.name for field in dataclasses.fields(UNetConfig)}
        return UNetConfig(**{name: value for name, value in vars(self).items() if name in names})

    def to_json(self) -> str:
        return json.dumps(vars(self), separators=(",", ":"))

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
        decoder = values["decoder_features"]
        pairs = decoder if decoder is None else tuple(map(tuple, decoder))
        case = cls(**{**values, "features": tuple(values["features"]), "decoder_features": pairs})
        least = case.config.minimum_size
        whole = ("batch", "height", "width", "weight_scale", "input_scale", "seed")
        if any(type(values[name]) is not int for name in whole) or type(values["training"]) is not bool:
            raise ValueError(f"expected integers for {', '.join(whole)} and a truth value for training, got {text}")
        if case.batch < 1 or min(case.height, case.width) < least or case.seed < 0:
            raise ValueError(f"expected a batch of at least 1 and maps of at least {least}x{least}, got {text}")
        return case

    def inputs(self, device: str) -> Tensor:
        """(N, C, H, W), of this case's dtype and strides."""
        shape = (self.batch, self.in_channels, self.height, self.width)
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
        model = FastUNet.from_config(self.config)
        randomise(model, self.seed + 1)
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    scale = 0
                    if ".net." in name:
                        scale = self.weight_scale if name.endswith(".net.0") else -self.weight_scale
                    module.weight.mul_(2.0**scale)
                    # A bias far larger than what it is added to makes a constant map. What comes in is of
                    # the inputs' size, or that of the first convolution of a pair; a norm makes it 1.
                    if self.norm is None:
                        scale = self.input_scale + (self.weight_scale if name.endswith(".net.0") else 0)
                    elif name == "downs.0.conv.net.0":
                        scale += self.input_scale
                    module.bias.mul_(2.0**scale)  # pyright: ignore[reportOptionalMemberAccess]
        plain = UNet.from_config(self.config)
        plain.load_state_dict(model.state_dict())
        return model.to(device).train(self.training), plain.to(device).train(self.training)

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

    deepest, largest, most = (2, 2, 2) if _interpreted(device) else (4, 6, 3)

    @st.composite
    def cases(draw: Callable) -> Case:
        narrow, wide = st.integers(1, 12), st.integers(17, 40)
        if _interpreted(device):
            # Several steps of a kernel's loop, whole ones and not: they take their time, and are not for every case.
            wide = st.sampled_from((48, 65)) if draw(st.integers(0, 15)) == 15 else narrow
        widths = narrow | wide
        features = tuple(draw(st.lists(widths, min_size=2, max_size=deepest)))
        norm = draw(st.sampled_from(NORM))
        dtype = draw(st.sampled_from(list(DTYPES)))
        training = norm == "batch" and draw(st.booleans())
        least = 2 ** (len(features) - 1)
        batch = draw(st.integers(1, most))
        height, width = draw(st.integers(least, largest * least)), draw(st.integers(least, largest * least))
        # A norm squares what comes to it.
        room = _ROOM[dtype] // (1 if norm is None or dtype == "float16" else 2)
        scales = weight_scales = st.integers(-room, room)
        if norm == "instance" or training:
            scales = st.integers(-_ROOM_OF_A_VARIANCE, room)
            weight_scales = st.integers(-_ROOM_OF_A_VARIANCE, _ROOM_OF_A_VARIANCE)
            if (height // least) * (width // least) * (batch if training else 1) < _PIXELS_OF_A_VARIANCE:
                height, width = 6 * least, 6 * least
                batch = 1 if _interpreted(device) else batch
        return Case(
            in_channels=draw(st.integers(1, 5)),
            out_channels=draw(st.integers(1, 4)),
            features=features,
            upsample=draw(st.sampled_from(UPSAMPLE)),
            align_corners=draw(st.booleans()),
            norm=norm,
            activation=draw(st.sampled_from(ACTIVATION)),
            negative_slope=draw(st.sampled_from(_NEGATIVE_SLOPES)),
            decoder_features=draw(st.none() | st.tuples(*[st.tuples(narrow, narrow)] * (len(features) - 1))),
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
