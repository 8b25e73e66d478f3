"""One frozen description of a U-Net, shared by the reference, the fast model and the tools.

>>> UNetConfig(features=(16, 32, 64)).depth
2
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import TypedDict  # total=False with Unpack is new in Python 3.11

    class Options(TypedDict, total=False):
        """The keyword arguments of a U-Net, as :class:`UNetConfig` describes them."""

        upsample: str
        align_corners: bool
        norm: str | None
        activation: str
        negative_slope: float
        decoder_features: tuple[tuple[int, int], ...] | None
        up_features: tuple[int | None, ...] | None
        encoder_convs: tuple[int, ...] | None
        decoder_convs: tuple[int, ...] | None
        downsample: str
        strides: tuple[tuple[int, int], ...] | None
        concat: str
        match: str
        padding: str
        order: str
        conv_bias: bool
        norm_eps: float
        norm_momentum: float
        final_activation: str | None


UPSAMPLE = ("bilinear", "bilinear_conv", "nearest", "nearest_conv", "transpose")
NORM = (None, "batch", "instance")
ACTIVATION = ("relu", "leaky_relu")
_CHOICES = {
    "upsample": UPSAMPLE,
    "align_corners": (True, False),
    "norm": NORM,
    "activation": ACTIVATION,
    "downsample": ("max_pool", "stride"),
    "concat": ("upsampled_first", "skip_first"),
    "match": ("zero_pad", "replicate_pad", "center_crop"),
    "padding": ("same", "valid"),
    "order": ("conv_norm_act", "conv_act_norm"),
    "conv_bias": (True, False),
    "final_activation": (None, "sigmoid"),
}


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net (Ronneberger et al. 2015, arXiv:1505.04597).

    Levels count from full resolution, 0, down to the bottleneck.

    Args:
        in_channels: channels of the input image.
        out_channels: channels of the output logits.
        features: channels of each level; the last is the bottleneck.
        upsample: how a decoder level doubles its map. ``"bilinear"`` keeps the channels,
            ``"bilinear_conv"`` follows with a 1x1 convolution down to the skip's channels,
            ``"nearest"`` keeps the channels, ``"nearest_conv"`` follows with a 3x3 convolution
            down to the skip's channels, norm and activation, ``"transpose"`` is a learned 2x2
            stride-2 transposed convolution down to the skip's channels (the original paper).
        align_corners: of the bilinear kinds, as in ``torch.nn.Upsample``.
        norm: ``None``, ``"batch"`` or ``"instance"`` (affine).
        activation: ``"relu"`` or ``"leaky_relu"``.
        negative_slope: of the leaky ReLU.
        decoder_features: (middle, out) channels of each decoder level: of its last convolution,
            and of those before; by default both are the level's ``features``.
        up_features: channels to which each decoder level's learned upsampling maps; by default the
            skip's. None for a ``"bilinear_conv"`` level without a convolution.
        encoder_convs: 3x3 convolutions of each level's encoder, the bottleneck's last; by default 2.
        decoder_convs: of each level's decoder; by default 2.
        downsample: how an encoder level is reached: a ``"max_pool"``, or by the ``"stride"`` of its
            first convolution. The latter takes only sizes that divide by ``reduction``.
        strides: (rows, columns) by which each step down divides the map; by default 2 and 2. Other
            steps go with ``upsample="transpose"``, whose filters have that size.
        concat: ``"upsampled_first"`` or ``"skip_first"``: the order on channels.
        match: what is done where the upsampled map and its skip differ in size: the map is filled
            up with zeros (``"zero_pad"``) or its own border (``"replicate_pad"``), or the skip is
            cut (``"center_crop"``), and then the output is smaller than the input.
        padding: of the 3x3 convolutions, as ``torch.nn.Conv2d`` has it: ``"same"`` pads with zeros,
            ``"valid"`` (the original paper) does not and takes a pixel off each side.
        order: of norm and activation: ``"conv_norm_act"`` or ``"conv_act_norm"``.
        conv_bias: whether the 3x3 convolutions have a bias.
        norm_eps, norm_momentum: as in ``torch.nn.BatchNorm2d``.
        final_activation: None or ``"sigmoid"``: what follows the head.

    Raises:
        ValueError: names the argument, its value and what was expected.
    """

    in_channels: int = 1
    out_channels: int = 2
    features: tuple[int, ...] = (64, 128, 256, 512, 1024)
    upsample: str = "bilinear"
    align_corners: bool = True
    norm: str | None = None
    activation: str = "relu"
    negative_slope: float = 0.01
    decoder_features: tuple[tuple[int, int], ...] | None = None
    up_features: tuple[int | None, ...] | None = None
    encoder_convs: tuple[int, ...] | None = None
    decoder_convs: tuple[int, ...] | None = None
    downsample: str = "max_pool"
    strides: tuple[tuple[int, int], ...] | None = None
    concat: str = "upsampled_first"
    match: str = "zero_pad"
    padding: str = "same"
    order: str = "conv_norm_act"
    conv_bias: bool = True
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    final_activation: str | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "features", tuple(self.features))
        except TypeError:
            raise ValueError(f"features: expected a sequence of positive integers, got {self.features!r}") from None
        self._levels("decoder_features", self.depth, "(middle, out)", _is_pair)
        self._levels("strides", self.depth, "(rows, columns)", _is_pair)
        self._levels("encoder_convs", self.depth + 1, "a positive integer", _is_count)
        self._levels("decoder_convs", self.depth, "a positive integer", _is_count)
        may_lack = self.upsample == "bilinear_conv"
        self._levels(
            "up_features",
            self.depth,
            "a positive integer" + (" or None" if may_lack else ""),
            lambda n: _is_count(n) or (may_lack and n is None),
        )
        if not self.features:
            raise ValueError("features: expected at least one level, got ()")
        for name, values in (
            ("in_channels", (self.in_channels,)),
            ("out_channels", (self.out_channels,)),
            ("features", self.features),
        ):
            for value in values:
                if not _is_count(value):
                    raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
        for name, most in (("negative_slope", 1), ("norm_eps", math.inf), ("norm_momentum", math.inf)):
            value = getattr(self, name)
            # A slope of 1 or more would make the sign of the output differ from max(x, slope * x).
            if not (isinstance(value, (int, float)) and 0 <= value < most):
                raise ValueError(f"{name}: expected a number in [0, {most}), got {value!r}")
        self._check_together()

    def _levels(self, name: str, count: int, each: str, valid: Callable[[Any], bool]) -> None:
        """Turn an argument with an entry for each level into a tuple, or raise."""
        given = getattr(self, name)
        if given is None:
            return
        try:
            entries = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in given)
        except TypeError:
            entries = ()
        if len(entries) != count or not all(map(valid, entries)):
            raise ValueError(f"{name}: expected None or {each} for each of {count} levels, got {given!r}")
        object.__setattr__(self, name, entries)

    def _check_together(self) -> None:
        """Arguments that are right by themselves and not together."""
        if self.up_features is not None and self.upsample in ("bilinear", "nearest"):
            raise ValueError(f"up_features: expected None with upsample={self.upsample!r}, got {self.up_features!r}")
        if self.upsample != "transpose" and any(pair != (2, 2) for pair in self.strides or ()):
            raise ValueError(f"strides: expected 2 and 2 without upsample='transpose', got {self.strides!r}")
        if self.padding == "valid" and (self.downsample, self.match) != ("max_pool", "center_crop"):
            raise ValueError(
                "padding: expected 'same' without downsample='max_pool' and match='center_crop', got 'valid'"
            )

    @property
    def depth(self) -> int:
        """Number of steps down."""
        return len(self.features) - 1

    @property
    def reductions(self) -> tuple[int, int]:
        """How many (rows, columns) of the input one of the bottleneck spans."""
        rows = cols = 1
        for level in range(1, self.depth + 1):
            rows, cols = rows * self.stride(level)[0], cols * self.stride(level)[1]
        return rows, cols

    @property
    def reduction(self) -> int:
        """The larger of :attr:`reductions`."""
        return max(self.reductions)

    @property
    def minimum_size(self) -> int:
        """The smallest height or width, in pixels, that survives every step down."""
        if self.padding == "same":
            return self.reduction
        return max(self._minimum_unpadded(axis) for axis in (0, 1))

    def _minimum_unpadded(self, axis: int) -> int:
        """From the output back to the input: the least that each map must be, as a convolution takes two pixels."""
        need = 1
        for level in range(self.depth):
            need = max(1, -(-(need + 2 * self.convs_up(level)) // self.stride(level + 1)[axis]))
        for level in range(self.depth, 0, -1):
            need = (need + 2 * self.convs_down(level)) * self.stride(level)[axis]
        return need + 2 * self.convs_down(0)

    @property
    def keeps_size(self) -> bool:
        """Whether the output has the input's height and width, whatever they are."""
        return self.match != "center_crop" and self.downsample != "stride"

    @property
    def slope(self) -> float:
        """Negative slope of the activation as an operator sees it: 0 is a plain ReLU."""
        return self.negative_slope if self.activation == "leaky_relu" else 0.0

    @property
    def threshold(self) -> float:
        """Above it an output of a single channel is foreground: of logits 0, of probabilities a half."""
        return 0.5 if self.final_activation == "sigmoid" else 0.0

    def stride(self, level: int) -> tuple[int, int]:
        """(rows, columns) by which the step from the level above to ``level`` divides a map."""
        return (2, 2) if self.strides is None else self.strides[level - 1]

    def convs_down(self, level: int) -> int:
        """3x3 convolutions of encoder ``level``."""
        return 2 if self.encoder_convs is None else self.encoder_convs[level]

    def convs_up(self, level: int) -> int:
        """3x3 convolutions of decoder ``level``."""
        return 2 if self.decoder_convs is None else self.decoder_convs[level]

    def decoder_channels(self, level: int) -> tuple[int, int]:
        """(middle, out) channels of decoder ``level``; 0 is full resolution."""
        if self.decoder_features is None:
            return self.features[level], self.features[level]
        return self.decoder_features[level]

    def channels_from(self, level: int) -> int:
        """Channels that leave ``level``: the bottleneck's, where it is the last, or its decoder's."""
        return self.features[-1] if level == self.depth else self.decoder_channels(level)[1]

    def upsampling(self, level: int) -> str:
        """The kind of decoder ``level``: ``upsample``, but for levels without a convolution."""
        lacks = self.up_features is not None and self.up_features[level] is None
        return "bilinear" if lacks else self.upsample

    def upsampled_channels(self, level: int) -> int:
        """Channels that decoder ``level`` concatenates with its skip."""
        if self.upsampling(level) in ("bilinear", "nearest"):
            return self.channels_from(level + 1)
        return self.features[level] if self.up_features is None else self.up_features[level] or 0

    def sides(self, size: int, axis: int = 0) -> tuple[list[int], list[int]]:
        """Of an input of ``size`` pixels along ``axis`` (0: rows), those of each level's map.

        Returns:
            As its encoder leaves them, and as its decoder does; of the bottleneck they are the same.
            The output has the last list's first.
        """
        lost = 2 if self.padding == "valid" else 0
        down: list[int] = []
        for level in range(self.depth + 1):
            if level:
                step = self.stride(level)[axis]
                size = -(-size // step) if self.downsample == "stride" else size // step
            size -= lost * self.convs_down(level)
            down.append(size)
        up = [size]
        for level in reversed(range(self.depth)):
            size = size * self.stride(level + 1)[axis] if self.match == "center_crop" else down[level]
            size -= lost * self.convs_up(level)
            up.insert(0, size)
        return down, up

    def changes(self) -> dict[str, Any]:
        """What is not as by default."""
        default = vars(type(self)())
        return {name: value for name, value in vars(self).items() if value != default[name]}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> UNetConfig:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, or an entry this version does not know.
        """
        try:
            entries: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"config: expected JSON, got {text[:60]!r} ({error})") from None
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(entries, dict):
            raise ValueError(f"config: expected a JSON object, got {text[:60]!r}")
        unknown = next((name for name in entries if name not in known), None)
        if unknown is not None:
            raise ValueError(f"config: expected entries among {sorted(known)}, got {unknown!r}")
        return cls(**entries)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_count, value))
