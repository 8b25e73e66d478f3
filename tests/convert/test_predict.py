"""Images of any size through networks whose output is smaller than their input, or that take few sizes."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastunet import FastUNet
from fastunet.images import limits, scale
from fastunet.predict import margins, predict_logits, receptive_radius

VALID: dict[str, Any] = {"upsample": "transpose", "padding": "valid", "match": "center_crop"}
CROPPED: dict[str, Any] = {"upsample": "nearest", "match": "center_crop"}
STRIDED: dict[str, Any] = {"upsample": "transpose", "downsample": "stride", "strides": ((2, 2), (2, 1))}


@pytest.mark.parametrize("options", [VALID, CROPPED, STRIDED], ids=["valid", "cropped", "strided"])
def test_tiles_agree_with_the_whole_and_every_pixel_is_its_own(options, seed):
    model = FastUNet(1, 2, (3, 4, 5), **options).eval()
    image = np.random.default_rng(seed).random((151, 93))
    whole = predict_logits(model, image)
    assert whole.shape == (2, 151, 93)
    halo = receptive_radius(model.config)
    torch.testing.assert_close(predict_logits(model, image, tile=2 * halo + 40), whole, rtol=1e-4, atol=1e-5)
    # In the middle no border is repeated: the network itself, on a crop around a pixel.
    (above, below), (left, right) = (margins(model.config, side, axis) for axis, side in enumerate(image.shape))
    x = F.pad(scale(image, 1, limits(image, 1))[None], [left, right, above, below], mode="replicate")
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0, :, :151, :93], whole)
    if options is VALID:  # which loses as much on each side
        assert above == left == (x.shape[2] - model(x).shape[2]) // 2 > 0
    else:
        assert above == left == 0


def test_a_pixel_stays_where_it_is(seed):
    """A bright spot through an unpadded network of positive weights gives its brightest output there."""
    model = FastUNet(1, 1, (1, 1, 1), **VALID).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.ndim == 4 else 0.0)
    image = np.zeros((64, 64))
    image[21, 38] = 1.0
    found = predict_logits(model, image)[0]
    row, col = divmod(int(found.argmax()), 64)
    assert abs(row - 21) <= 2 and abs(col - 38) <= 2
