"""References of one's own, and what ``fastunet.verify`` refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastunet
from fastunet import reference
from fastunet.ops import forward
from fastunet.reference import UNet

from .networks import Faulty, pair
from .test_mutants import swapped_concat


class Own(nn.Module):
    """The same function under other parameter names."""

    def __init__(self, plain: UNet) -> None:
        super().__init__()
        self.network = plain

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def test_a_reference_with_its_own_names_is_compared_in_its_output(x):
    model, plain = pair()
    report = fastunet.verify(model, Own(plain), x)
    assert report.ok
    assert [(c.kind, c.name) for c in report.comparisons] == [
        ("output", "logits"),
        ("output", "logits with gradients"),
        ("gradient", "input"),
    ]


class SameNames(nn.Module):
    """A user's own assembly of the blocks, under the same names."""

    def __init__(self, plain: UNet) -> None:
        super().__init__()
        self.downs, self.bottleneck, self.ups, self.head = plain.downs, plain.bottleneck, plain.ups, plain.head

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for down in self.downs:
            x, skip = down(x)
            skips.append(skip)
        x = self.bottleneck(x)
        for up in self.ups:
            x = up(x, skips.pop())
        return self.head(x)


def test_a_reference_with_the_same_names_is_compared_layer_by_layer(x, monkeypatch):
    model, plain = pair()
    ours, theirs = (
        [c.name for c in fastunet.verify(model, network, x).comparisons] for network in (SameNames(plain), plain)
    )
    assert ours == theirs
    monkeypatch.setattr(forward, "reference", Faulty(reference, upsample_concat_conv2d_relu=swapped_concat))
    report = fastunet.verify(model, SameNames(plain), x)
    assert report.first_failure is not None and report.first_failure.name == "ups.0.conv.net.0", str(report)


class Smooth(Own):
    """Shows no ReLU or max-pool, as a network compiled elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return self.network(x)


def test_a_reference_of_other_decisions_is_named(x):
    model, plain = pair()
    with pytest.raises(ValueError, match="gradients: cannot be compared, .* more ReLUs and max-pools in the model"):
        fastunet.verify(model, Smooth(plain), x)
    assert fastunet.verify(model, Smooth(plain), x, gradients=False).ok


def test_clear_errors(x):
    model, plain = pair()
    with pytest.raises(ValueError, match=r"inputs: expected finite values, found NaN or infinity"):
        fastunet.verify(model, plain, x / 0)
    with pytest.raises(ValueError, match=r"inputs: expected floating \(N, C, H, W\), got list"):
        fastunet.verify(model, plain, [x])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"inputs: expected floating \(N, C, H, W\), got torch.float32 \(2, 19, 22\)"):
        fastunet.verify(model, plain, x[:, 0])
    with pytest.raises(ValueError, match=r"reference: expected 'downs.0.conv.net.0.weight' of shape"):
        fastunet.verify(model, UNet(2, 3, (5, 6, 8)), x)
    with pytest.raises(ValueError, match=r"reference: expected the model's parameters, lacks 'downs.1"):
        fastunet.verify(model, UNet(2, 3, (4, 8)), x)
    with pytest.raises(ValueError, match="outputs: expected one shape"):
        fastunet.verify(model, Own(UNet(2, 2, (4, 6, 8))), x)
    normed, plain_normed = pair(norm="batch")
    shapes = r"got \(2, 4, 19, 22\) and the reference's \(2, 5, 19, 22\)"
    with pytest.raises(ValueError, match=rf"layer 'downs.0.conv.net.0': expected one shape, {shapes}"):
        fastunet.verify(normed, UNet(2, 3, (5, 6, 8)), x)
    with pytest.raises(
        ValueError, match="reference: expected its batch norms in the train or eval mode of the model's"
    ):
        fastunet.verify(normed, plain_normed.train(), x)
    with torch.no_grad():
        plain.head.weight[1] += 1
    with pytest.raises(ValueError, match="reference: expected plain PyTorch, got a FastUNet"):
        fastunet.verify(model, model, x)
    with pytest.raises(ValueError, match="reference: expected plain PyTorch, got a FastUNet"):
        fastunet.verify(model, Own(model), x)
    with pytest.raises(ValueError, match=r"reference: expected the model's weights, 'head.weight' holds other values"):
        fastunet.verify(model, plain, x)
