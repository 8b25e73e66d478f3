"""What a FastUNet keeps for its backward pass, in bytes: each map once, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastunet import FastUNet, dispatch
from fastunet.parity.recording import Recorder
from fastunet.reference import UNet

from .test_model import KINDS
from .test_training import loss_of, through_the_operators

__all__ = ["through_the_operators"]  # a fixture, of this file too


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the memory that autograd holds after the forward pass, parameters and input aside."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), x)}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    "features, size, options, dtype, limit",
    [
        ((8, 16, 32, 64, 128), 64, {}, torch.float32, 0.6),
        pytest.param((64, 128, 256, 512, 1024), 256, {}, torch.float32, 0.6, marks=pytest.mark.slow),
        ((8, 16, 32), 32, {"norm": "batch"}, torch.float32, 0.72),
        ((8, 16, 32), 32, {"norm": "batch"}, torch.float16, 0.70),
        ((8, 16, 32), 32, {"norm": "instance"}, torch.float32, 0.72),
        ((8, 16, 32), 32, {"upsample": "transpose"}, torch.float32, 0.79),  # whose map is a convolution's result
        ((8, 16, 32), 32, {"upsample": "nearest"}, torch.float32, 0.57),
    ],
    ids=["small", "seed", "batch norm", "batch norm in float16", "instance norm", "transpose", "nearest"],
)
def test_what_is_saved_is_less_than_eagers(features, size, options, dtype, limit):
    nets = [net(1, 2, features, **options).to(dtype) for net in (FastUNet, UNet)]
    ours, theirs = (kept_bytes(net, torch.randn(1, 1, size, size, dtype=dtype)) for net in nets)
    print(f"saved for backward: {ours:,} bytes, eager {theirs:,}, {ours / theirs:.3f} of it")  # noqa: T201
    assert ours <= limit * theirs


GEOMETRIES = {
    "unpadded": (44, {"padding": "valid", "match": "center_crop"}),
    "unpadded, transpose": (44, {"padding": "valid", "match": "center_crop", "upsample": "transpose"}),
    "strided": (24, {"downsample": "stride", "upsample": "transpose", "strides": ((2, 1), (3, 2))}),
}


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("size, options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_with_strides_and_without_padding_no_map_is_saved_twice(size, options, implementation, seed, device):
    """Nor one that was upsampled or concatenated: the results of convolutions and pools alone, and the input."""
    net = FastUNet(1, 2, (4, 6, 8), **options).to(device)
    x = torch.randn(1, 1, size, size, device=device)
    with dispatch.forced(implementation):
        with Recorder() as recorder:
            loss_of(net, x)
        *inner, _ = recorder.steps  # the head's is the output
        sizes = [t.numel() for step in inner for t in (step.result, step.pooled) if t is not None]
        assert kept_bytes(net, x) == 4 * sum(sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_every_map_is_kept_in_its_dtype(dtype):
    """And but for those the input and the weights in it, as eager keeps them; no map in both."""
    net, x = FastUNet(1, 2, (8, 16, 32)), torch.randn(2, 1, 32, 32)
    full = kept_bytes(net, x)
    with torch.autocast("cpu", dtype):
        kept = kept_bytes(net, x)
    cast = [x, *(p for p in net.parameters() if p.dim() == 4)]
    assert kept == full // 2 + sum(2 * t.numel() for t in cast)


@pytest.mark.parametrize("match", ["zero_pad", "center_crop"])
def test_no_less_is_saved_where_a_map_and_its_skip_differ(match):
    nets = (net(1, 2, (8, 16, 32), match=match) for net in (FastUNet, UNet))
    ours, theirs = (kept_bytes(net, torch.randn(1, 1, 39, 39)) for net in nets)
    assert ours <= 0.6 * theirs


def test_a_repeated_border_is_not_saved(seed):
    """Of a map that is padded by replication no padded copy is: one of zeros keeps as much."""
    sizes = []
    for match in ("zero_pad", "replicate_pad"):
        net = FastUNet(1, 2, (4, 8), upsample="bilinear", match=match)
        sizes.append(kept_bytes(net, torch.randn(1, 1, 19, 21)))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kind", [*KINDS, "nearest_conv"])
def test_each_map_is_saved_once_and_no_other(kind):
    """The input, every convolution's result and every pooled map; nothing upsampled, concatenated or before a ReLU."""
    features, size = (4, 6, 8), 16
    net = FastUNet(2, 3, features, upsample=kind)
    maps, side = 0, size
    for f in features[:-1]:
        maps += 2 * f * side**2 + f * (side // 2) ** 2  # two convolutions and the pooled map
        side //= 2
    maps += 2 * features[-1] * side**2
    for i in reversed(range(len(features) - 1)):
        if kind == "bilinear_conv":
            maps += net.config.upsampled_channels(i) * side**2
        side *= 2
        if kind in ("transpose", "nearest_conv"):
            maps += net.config.upsampled_channels(i) * side**2
        maps += 2 * features[i] * side**2
    assert kept_bytes(net, torch.randn(1, 2, size, size)) == 4 * maps


@pytest.mark.parametrize("order", ["conv_norm_act", "conv_act_norm"])
@pytest.mark.parametrize("norm", ["batch", "instance", "fixed"])
def test_behind_norms_no_places_of_maxima_are_saved(norm, order, seed, device):
    """The input and the result of every norm, the pooled maps and the norms' statistics."""
    features, size = (4, 6), 8
    maps = 4 * features[0] * size**2 + (features[0] + 4 * features[1]) * (size // 2) ** 2 + 4 * features[0] * size**2
    statistics = 2 * (2 * features[0] + 2 * features[1] + 2 * features[0])  # mean and deviation, in float32
    net = FastUNet(1, 2, features, norm="batch" if norm == "fixed" else norm, order=order).to(device)
    net.train(norm != "fixed")
    statistics //= 1 + (norm == "fixed")  # of which the mean is the network's own
    with dispatch.forced("triton"):
        kept = kept_bytes(net, torch.randn(1, 1, size, size, device=device))
    places = features[0] * (size // 2) ** 2
    assert 4 * (maps + statistics) <= kept < 4 * (maps + statistics) + 8 * places


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_of_a_frozen_norm_in_eval_mode_the_map_before_it_is_not_saved(implementation, seed, device):
    """But the statistics, of a few channels; and the gradients are those of a norm that is not frozen."""
    net = FastUNet(1, 2, (4, 6), norm="batch").to(device).eval()
    plain = FastUNet(1, 2, (4, 6)).to(device)
    x = torch.randn(1, 1, 8, 8, device=device)
    with dispatch.forced(implementation):
        loss_of(net, x).backward()
        expected = {
            name: p.grad for name, p in net.named_parameters() if ".net.1." not in name and ".net.4." not in name
        }
        net.zero_grad()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        loss_of(net, x).backward()
        got = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
        more = kept_bytes(net, x) - kept_bytes(plain, x)
    assert 0 < more < 4 * 4 * 8 * 8
    assert got.keys() == expected.keys()
    for name, g in got.items():
        assert g is not None and torch.equal(g, expected[name]), name  # pyright: ignore[reportArgumentType]
