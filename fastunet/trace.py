"""The data flow of a U-Net on paper: every fused operator with its shapes, parameters and work.

Nothing is allocated, so the trace of any network costs microseconds. The tutorial's two slips,
in one place:

- Its walk goes from 256x256 to a 32x32 bottleneck with 512 channels coming in. 32x32 is three
  poolings; the four that give 512 channels end at 16x16.
- Its code upsamples bilinearly (``align_corners=True``), which keeps 1024 channels, so the first
  decoder level concatenates 1024 + 512 = 1536; its text says 512 + 512 = 1024, which takes a
  convolution after the upsampling (``upsample="bilinear_conv"``) or a learned one (``"transpose"``).

>>> from fastunet.config import UNetConfig
>>> [layer.out_shape for layer in trace(UNetConfig(), 256, 256) if layer.name.startswith("bottleneck")]
[(1, 1024, 16, 16), (1, 1024, 16, 16)]
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import UNetConfig

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Layer:
    """One fused operator of the forward pass in eval mode.

    Attributes:
        name: path of the module that holds the weight, e.g. ``"downs.0.conv.net.0"``.
        op: ``"conv2d_relu"``, ``"conv2d_relu_pool"``, ``"upsample_concat_conv2d_relu"`` or
            ``"conv_transpose2x2"``. The name of the family: the head, for one, has no activation.
        in_shapes: (N, C, H, W) of each input; the decoder's fused operator reads x and its skip.
        out_shape: (N, C, H, W) of the output; the pooled map that ``conv2d_relu_pool`` also
            returns is the next layer's input.
        parameters: elements of the weight, the bias and the norm's scale and shift.
        flops: 2 x multiply-adds of the convolution. Interpolation, bias, norm and activation,
            about a hundredth of it, are not counted.
    """

    name: str
    op: str
    in_shapes: tuple[Shape, ...]
    out_shape: Shape
    parameters: int
    flops: int


def trace(config: UNetConfig, height: int, width: int, batch: int = 1) -> list[Layer]:
    """Every fused operator that FastUNet runs for an input (batch, in_channels, height, width), in order.

    Raises:
        ValueError: ``batch`` below 1, or ``height`` or ``width`` too small for the poolings.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    for name, size in (("height", height), ("width", width)):
        if size < config.minimum_size:
            raise ValueError(f"{name}: expected at least {config.minimum_size} ({config.depth} poolings), got {size}")

    layers: list[Layer] = []
    second = 2 if config.norm is None else 3  # index in DoubleConv.net of its second convolution

    def conv(name: str, op: str, inputs: tuple[Shape, ...], channels: int, *, kernel: int = 3) -> Shape:
        n, _, h, w = inputs[-1]  # of x and skip, the skip has the output's size
        weight = kernel * kernel * sum(shape[1] for shape in inputs) * channels
        norm = 2 * channels if config.norm is not None and kernel == 3 else 0
        out = (n, channels, h, w)
        layers.append(Layer(name, op, inputs, out, weight + channels + norm, 2 * weight * n * h * w))
        return out

    # Instance norm needs the whole map before it can be pooled; eval-mode batch norm is a scale
    # and a shift of the weights.
    pool = "conv2d_relu" if config.norm == "instance" else "conv2d_relu_pool"
    x: Shape = (batch, config.in_channels, height, width)
    skips: list[Shape] = []
    for level, channels in enumerate(config.features[:-1]):
        x = conv(f"downs.{level}.conv.net.0", "conv2d_relu", (x,), channels)
        x = conv(f"downs.{level}.conv.net.{second}", pool, (x,), channels)
        skips.append(x)
        x = (batch, channels, x[2] // 2, x[3] // 2)

    for index in (0, second):
        x = conv(f"bottleneck.net.{index}", "conv2d_relu", (x,), config.features[-1])

    for index, skip in enumerate(reversed(skips)):
        name, channels = f"ups.{index}", skip[1]
        if config.upsample == "bilinear_conv":
            # A 1x1 convolution commutes with interpolation, whose weights sum to 1: before it,
            # the convolution reads a quarter of the pixels.
            x = conv(f"{name}.up.1", "conv2d_relu", (x,), channels, kernel=1)
        elif config.upsample == "transpose":
            # Every input pixel meets all 2x2 taps once.
            out = (batch, channels, 2 * x[2], 2 * x[3])
            weight = 4 * x[1] * channels
            flops = 2 * weight * batch * x[2] * x[3]
            layers.append(Layer(f"{name}.up", "conv_transpose2x2", (x,), out, weight + channels, flops))
            x = out
        middle, out = config.decoder_channels(config.depth - 1 - index)
        x = conv(f"{name}.conv.net.0", "upsample_concat_conv2d_relu", (x, skip), middle)
        x = conv(f"{name}.conv.net.{second}", "conv2d_relu", (x,), out)

    conv("head", "conv2d_relu", (x,), config.out_channels, kernel=1)
    return layers


def totals(layers: list[Layer]) -> tuple[int, int]:
    """(parameters, flops) of all layers together."""
    return sum(layer.parameters for layer in layers), sum(layer.flops for layer in layers)


def describe_flops(flops: int) -> str:
    """Three digits and a unit: ``describe_flops(1_230_000_000)`` is ``"1.23 GFLOP"``."""
    rounded = float(f"{flops:.2e}")  # first, so that 999.9 M becomes 1 G
    power = 0
    while rounded >= 1000 and power < 5:
        rounded, power = rounded / 1000, power + 1
    return f"{rounded:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}FLOP"
