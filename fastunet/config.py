"""One frozen description of a U-Net, shared by the reference, the fast model and the tools.

>>> UNetConfig(features=(16, 32, 64)).depth
2
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

UPSAMPLE = ("bilinear", "bilinear_conv", "nearest", "transpose")
NORM = (None, "batch", "instance")
ACTIVATION = ("relu", "leaky_relu")


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net (Ronneberger et al. 2015, arXiv:1505.04597).

    Args:
        in_channels: channels of the input image.
        out_channels: channels of the output logits.
        features: channels of each level, from full resolution down; the last is the bottleneck.
        upsample: how a decoder level doubles its map. ``"bilinear"`` keeps the channels,
            ``"bilinear_conv"`` follows with a 1x1 convolution down to the skip's channels,
            ``"nearest"`` keeps the channels, ``"transpose"`` is a learned 2x2 stride-2
            transposed convolution down to the skip's channels (the original paper).
        align_corners: of the bilinear kinds, as in ``torch.nn.Upsample``.
        norm: ``None``, ``"batch"`` or ``"instance"`` (affine), between convolution and activation.
        activation: ``"relu"`` or ``"leaky_relu"``.
        negative_slope: of the leaky ReLU.
        decoder_features: (middle, out) channels of each decoder level's two convolutions, from full
            resolution down; by default both are the level's ``features``.

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

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "features", tuple(self.features))
        except TypeError:
            raise ValueError(f"features: expected a sequence of positive integers, got {self.features!r}") from None
        if self.decoder_features is not None:
            self._check_decoder()
        if not self.features:
            raise ValueError("features: expected at least one level, got ()")
        for name, values in (
            ("in_channels", (self.in_channels,)),
            ("out_channels", (self.out_channels,)),
            ("features", self.features),
        ):
            for value in values:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        for name, value, allowed in (
            ("upsample", self.upsample, UPSAMPLE),
            ("align_corners", self.align_corners, (True, False)),
            ("norm", self.norm, NORM),
            ("activation", self.activation, ACTIVATION),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
        if not (isinstance(self.negative_slope, (int, float)) and 0 <= self.negative_slope < 1):
            # A slope of 1 or more would make the sign of the output differ from max(x, slope * x).
            raise ValueError(f"negative_slope: expected a number in [0, 1), got {self.negative_slope!r}")

    def _check_decoder(self) -> None:
        expected = f"None or (middle, out) for each of {self.depth} levels"
        try:
            pairs = tuple((middle, out) for middle, out in self.decoder_features or ())
        except (TypeError, ValueError):
            raise ValueError(f"decoder_features: expected {expected}, got {self.decoder_features!r}") from None
        if len(pairs) != self.depth or not all(type(n) is int and n > 0 for pair in pairs for n in pair):
            raise ValueError(f"decoder_features: expected {expected}, got {self.decoder_features!r}")
        object.__setattr__(self, "decoder_features", pairs)

    @property
    def depth(self) -> int:
        """Number of 2x2 poolings."""
        return len(self.features) - 1

    @property
    def minimum_size(self) -> int:
        """The smallest height or width, in pixels, that survives every pooling."""
        return 2**self.depth

    @property
    def slope(self) -> float:
        """Negative slope of the activation as an operator sees it: 0 is a plain ReLU."""
        return self.negative_slope if self.activation == "leaky_relu" else 0.0

    def decoder_channels(self, level: int) -> tuple[int, int]:
        """(middle, out) channels of decoder ``level``; 0 is full resolution."""
        if self.decoder_features is None:
            return self.features[level], self.features[level]
        return self.decoder_features[level]

    def channels_from(self, level: int) -> int:
        """Channels that leave ``level``: the bottleneck's, where it is the last, or its decoder's."""
        return self.features[-1] if level == self.depth else self.decoder_channels(level)[1]

    def upsampled_channels(self, level: int) -> int:
        """Channels that decoder ``level`` concatenates with its skip."""
        learned = self.upsample in ("bilinear_conv", "transpose")
        return self.features[level] if learned else self.channels_from(level + 1)

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
        if not isinstance(entries, dict) or not known.issuperset(entries):
            raise ValueError(f"config: expected a JSON object with entries among {sorted(known)}, got {text[:200]!r}")
        return cls(**entries)
