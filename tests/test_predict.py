"""Tiles against the whole image, small images, and what the receptive field really is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastunet import predict
from fastunet.config import UNetConfig
from fastunet.images import ImageError, normalise, scale
from fastunet.predict import predict_logits, predict_mask, receptive_radius
from fastunet.reference import UNet

# Nets whose output does not depend on where the image ends: tiles must equal the whole.
SHIFT_INVARIANT = {
    "bilinear": {"upsample": "bilinear", "align_corners": False},
    "bilinear_conv": {"upsample": "bilinear_conv", "align_corners": False},
    "nearest": {"upsample": "nearest"},
    "transpose": {"upsample": "transpose"},
    "batch": {"upsample": "bilinear", "align_corners": False, "norm": "batch"},
}


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def build(features: tuple[int, ...] = (4, 8, 16), **kind) -> UNet:
    """A network in eval mode, scaled so that the deepest level matters as much as the first."""
    model = UNet(1, 2, features, **kind).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def whole(model: UNet, image: np.ndarray, left: int = 0, right: int | None = None) -> Tensor:
    """The plain forward pass, of some columns of the normalised image if asked."""
    with torch.no_grad():
        return model(normalise(image, model.config.in_channels)[None, :, :, left:right])[0]


@pytest.mark.parametrize("kind", SHIFT_INVARIANT)
@pytest.mark.parametrize(
    ("height", "width", "tile"),
    [
        (200, 150, 128),
        (131, 153, 112),  # odd sizes: the last pooling drops a row and a column
        (60, 301, 150),  # one row of tiles; a tile that is no multiple of the pooling
        (129, 129, 128),  # one pixel too many
    ],
    ids=lambda value: str(value),
)
def test_tiles_equal_the_whole(kind: str, height: int, width: int, tile: int, rng: np.random.Generator) -> None:
    model = build(**SHIFT_INVARIANT[kind])
    image = rng.integers(0, 65536, (height, width)).astype(np.uint16)
    expected = whole(model, image)
    found = predict_logits(model, image, tile=tile)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def test_the_network_is_given_nothing_larger_than_a_tile(rng: np.random.Generator) -> None:
    model = build(upsample="nearest")
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    predict_logits(model, rng.random((140, 190)), tile=123)
    assert len(shapes) > 4
    assert max(max(shape[2:]) for shape in shapes) <= 123


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("upsample", ["bilinear", "transpose"])
def test_receptive_radius_is_what_a_nan_reaches(depth: int, upsample: str) -> None:
    """A NaN goes through every operator, so the outputs it reaches are those that read its pixel."""
    config = UNetConfig(features=(2,) * (depth + 1), upsample=upsample, align_corners=False)
    model = UNet.from_config(config).eval()
    radius, step = receptive_radius(config), config.minimum_size
    reach = 0
    for pixel in range(2 * radius, 2 * radius + step):
        x = torch.zeros(1, 1, 4 * radius + step, step)
        x[0, 0, pixel] = float("nan")
        with torch.no_grad():
            rows = model(x)[0, 0].isnan().any(1).nonzero()
        reach = max(reach, pixel - int(rows.min()), int(rows.max()) - pixel)
    assert reach <= radius
    if upsample == "bilinear":
        assert reach > radius - step  # not wider than it must be


def test_aligned_corners_leave_no_seam(rng: np.random.Generator) -> None:
    """Tiles of an align_corners=True net differ from the whole; neither much, nor abruptly."""
    model = build(align_corners=True)
    # Smooth, so that a step would stand out.
    coarse = torch.from_numpy(rng.random((1, 1, 6, 20)))
    image = torch.nn.functional.interpolate(coarse, (90, 300), mode="bicubic")[0, 0].numpy()
    expected, found = whole(model, image), predict_logits(model, image, tile=152)
    assert (found - expected).std() < 0.1 * expected.std()

    steps = found.diff(dim=2).abs().amax((0, 1))  # [W - 1]
    seams = torch.zeros_like(steps, dtype=torch.bool)
    # Tiles of 152 overlap in 88 = 28 + 32 + 28, so they start every 64 and blend 32 columns, 28 in.
    for start in (64, 128, 192):
        blend = slice(start + 28 - 1, start + 28 + 32)
        seams[blend] = True
        left, right = whole(model, image, start - 64, start + 88), whole(model, image, start, start + 152)
        left, change = left[..., 64:], right[..., :88] - left[..., 64:]  # where both tiles are, [2, H, 88]
        assert change.abs().max() > 0  # or there would be nothing to hide
        # From one column to the next the blend adds what the change does, and 1/32 of the change.
        added = (found[..., start : start + 88] - left).diff(dim=2)[..., 27:60].abs()
        change = change[..., 27:61]
        allowed = change.diff(dim=2).abs() + change.abs().amax() / 32
        assert (added <= allowed + 1e-5).all()
    assert steps[seams].max() <= 1.1 * steps[~seams].max()


def test_a_row_of_tiles_at_a_time_is_scaled(rng: np.random.Generator, monkeypatch) -> None:
    heights = []

    def recording(image: np.ndarray, *arguments) -> torch.Tensor:
        heights.append(len(image))
        return scale(image, *arguments)

    monkeypatch.setattr("fastunet.predict.scale", recording)
    predict_mask(build(), rng.random((500, 40)), tile=160)
    assert len(heights) > 3
    assert max(heights) <= 160


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2), (2, 50), (1, 1, 3)], ids=str)
def test_images_below_the_smallest_size(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    model = build((4, 4, 8, 8))  # needs 8x8
    image = rng.integers(0, 256, shape).astype(np.uint8)
    logits = predict_logits(model, image)
    assert logits.shape == (2, *shape[:2])
    assert torch.isfinite(logits).all()
    x = normalise(image, 1)
    rows, cols = np.minimum(np.arange(8), shape[0] - 1), np.minimum(np.arange(max(8, shape[1])), shape[1] - 1)
    with torch.no_grad():
        padded = model(x[:, rows][:, :, cols][None])[0]
    torch.testing.assert_close(logits, padded[:, : shape[0], : shape[1]])


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (17, 3), (4, 4)], ids=str)
def test_small_images_with_instance_norm(shape: tuple[int, int], rng: np.random.Generator) -> None:
    logits = predict_logits(build(norm="instance"), rng.random(shape))
    assert logits.shape == (2, *shape)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models(dtype: torch.dtype, rng: np.random.Generator) -> None:
    model = build(upsample="nearest")
    image = rng.random((5, 130))
    expected = predict_logits(model, image, tile=100)
    found = predict_logits(model.to(dtype), image, tile=100)
    assert found.dtype == torch.float32
    assert (found - expected).std() < 0.05 * expected.std()


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_mask_is_the_class_of_the_logits(classes: int, rng: np.random.Generator) -> None:
    model = UNet(3, classes, (4, 8, 16), upsample="nearest").eval()
    image = rng.integers(0, 256, (110, 137, 3)).astype(np.uint8)
    logits = predict_logits(model, image, tile=124)
    mask = predict_mask(model, image, tile=124)
    assert mask.dtype == np.uint8
    expected = logits[0] > 0 if classes == 1 else logits.argmax(0)
    assert np.array_equal(mask, expected.numpy())


def test_train_mode_is_refused_and_leaves_the_model_alone() -> None:
    model = UNet(1, 2, (4, 8), norm="batch")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for function in (predict_logits, predict_mask):
        with pytest.raises(ValueError, match="model: expected eval mode, got train mode"):
            function(model, np.zeros((20, 20)))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_tile_too_small_is_named_only_where_tiles_are_needed() -> None:
    model = build()
    predict_mask(model, np.zeros((10, 20)), tile=20)
    with pytest.raises(ValueError, match="tile: expected at least 92 pixels for this network, got 64"):
        predict_mask(model, np.zeros((10, 65)), tile=64)


def test_too_many_classes_for_a_byte() -> None:
    with pytest.raises(ValueError, match="at most 256 classes, got 257"):
        predict_mask(UNet(1, 257, (2, 2)).eval(), np.zeros((8, 8)))


def test_an_unusable_image_is_named() -> None:
    with pytest.raises(ImageError, match=r"image: expected shape \(H, W\) or \(H, W, 3\), got \(8, 8, 4\)"):
        predict_mask(build(), np.zeros((8, 8, 4)))


@pytest.mark.parametrize("depth", range(7))
def test_the_default_tile_serves_every_usual_depth(depth: int) -> None:
    config = UNetConfig(features=(2,) * (depth + 1))
    least = 2 * receptive_radius(config) + max(predict.RAMP, config.minimum_size) + config.minimum_size
    assert (least <= predict.TILE) == (depth < 6)
