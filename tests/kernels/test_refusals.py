"""What every launcher refuses, the Hopper kernels' too: a gradient that would be missing."""

from __future__ import annotations

import pytest
import torch

from fastunet import kernels


def t(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


# Arguments of each, by name.
SOURCES = {"x": t(1, 3, 2, 2), "skip": t(1, 2, 4, 4), "weight": t(4, 5, 3, 3), "bias": t(4)}
CONV = {"x": t(1, 3, 4, 4), "weight": t(4, 3, 3, 3), "bias": t(4)}
TRANSPOSE = {"x": t(1, 3, 2, 2), "weight": t(3, 4, 2, 2), "bias": t(4)}
ARGUMENTS = {
    "activation_bwd": {"grad": t(1, 4, 4, 4), "grad_pooled": t(1, 4, 2, 2), "y": t(1, 4, 4, 4)},
    "conv_dgrad": {"g": t(1, 4, 4, 4), "weight": t(4, 3, 3, 3)},
    "conv_fwd": CONV,
    "conv_head_fwd": CONV | {"head": t(2, 4, 1, 1), "head_bias": t(2)},
    "conv_moments_fwd": CONV,
    "conv_pool_fwd": CONV,
    "conv_transpose_dgrad": {"grad": t(1, 4, 4, 4), "weight": t(3, 4, 2, 2)},
    "conv_transpose_fwd": TRANSPOSE,
    "norm_fwd": {"x": t(1, 4, 4, 4), "weight": t(4), "bias": t(4)},
    "norm_bwd": {"grad": t(1, 4, 4, 4), "grad_pooled": t(1, 4, 2, 2), "x": t(1, 4, 4, 4), "y": t(1, 4, 4, 4)}
    | {"weight": t(4), "mean": t(4), "rstd": t(4)},
    "conv_transpose_wgrad": {"grad": t(1, 4, 4, 4), "x": t(1, 3, 2, 2)},
    "conv_wgrad": {"g": t(1, 4, 4, 4), "sources": [t(1, 3, 4, 4), t(1, 2, 4, 4)], "ksize": 3},
    "stem_fwd": CONV,
    "upconcat_conv3x3_commuted_fwd": SOURCES,
    "upconcat_conv3x3_fwd": SOURCES,
    "upconcat_conv3x3_moments_fwd": SOURCES,
    "upsample_bwd": {"grad": t(1, 4, 4, 4), "height": 2, "width": 2},
    "upsample_concat_fwd": {"x": t(1, 3, 2, 2), "skip": t(1, 2, 4, 4)},
    "upsample_fwd": {"x": t(1, 3, 2, 2), "height": 4, "width": 4},
}
OPTIONS = {
    "activation_bwd": {"slope": 0.0, "bias": True},
    "norm_fwd": {"eps": 1e-5, "slope": 0.0, "pool": True},
    "norm_bwd": {"slope": 0.0},
    "conv_wgrad": {"bias": True},
    "conv_transpose_wgrad": {"bias": True},
    "conv_fwd": {"slope": 0.0},
    "conv_head_fwd": {"slope": 0.0},
    "conv_moments_fwd": {"eps": 1e-5, "per_image": False},
    "conv_pool_fwd": {"slope": 0.0},
    "stem_fwd": {"slope": 0.0},
    "upconcat_conv3x3_commuted_fwd": {"mode": "nearest", "align_corners": False, "slope": 0.0},
    "upconcat_conv3x3_fwd": {"mode": "nearest", "align_corners": False, "slope": 0.0},
    "upconcat_conv3x3_moments_fwd": {"mode": "nearest", "align_corners": False, "eps": 1e-5, "per_image": False},
    "upsample_bwd": {"mode": "nearest", "align_corners": False},
    "upsample_concat_fwd": {"mode": "nearest", "align_corners": False},
    "upsample_fwd": {"mode": "nearest", "align_corners": False},
}
LAUNCHERS = [(module, name) for module in (kernels, kernels.hopper) for name in module.__all__ if name in ARGUMENTS]


def test_no_launcher_is_left_out():
    assert {name for name in kernels.__all__ if name.islower() and name not in ("hopper", "tf32")} == ARGUMENTS.keys()
    assert {name for name in kernels.hopper.__all__ if name.endswith("_fwd")} <= ARGUMENTS.keys()


@pytest.mark.parametrize("module, name", LAUNCHERS, ids=lambda value: getattr(value, "__name__", value))
def test_a_gradient_that_would_be_missing_is_refused_by_the_arguments_name(module, name):
    launcher, options = getattr(module, name), OPTIONS.get(name, {})
    for argument, value in ARGUMENTS[name].items():
        if isinstance(value, int):
            continue
        wanted = value[-1] if isinstance(value, list) else value
        wanted.requires_grad_()
        try:
            with pytest.raises(ValueError, match=f"^{argument}: expected no tensor that requires a gradient, .*{name}"):
                launcher(*ARGUMENTS[name].values(), **options)
        finally:
            wanted.requires_grad_(False)


def test_without_gradients_it_is_served(device):
    x, weight = torch.ones(1, 1, 2, 2, device=device, requires_grad=True), torch.ones(1, 1, 1, 1, device=device)
    with torch.no_grad():
        assert torch.equal(kernels.conv_fwd(x, weight, None, slope=0.0), x)
