"""Every family and variant: the same function, the same gradients, and the same weights back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastunet
from fastunet import weights
from fastunet.convert import export
from fastunet.convert.family import key_map, paths
from fastunet.origin import Origin
from fastunet.reference import UNet

from .cases import CASES, image, make

ALL = pytest.mark.parametrize("name", CASES)


def origin_of(model: fastunet.FastUNet) -> Origin:
    assert model.origin is not None
    return model.origin


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, in units of the largest value where that is above 1."""
    assert a.shape == b.shape
    return (a - b).abs().max().item() / max(1.0, b.abs().max().item())


@ALL
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_function_and_gradients_in_float64(name, training, seed):
    """Below 1e-10, with respect to the input and every parameter; and the same running statistics."""
    original = make(name).double().train(training)
    model = fastunet.convert(original)
    assert model.training == training
    x = image(original, CASES[name].size)
    with torch.no_grad():
        assert off(copy.deepcopy(model)(x), copy.deepcopy(original)(x)) < 1e-10
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = original(a), model(b)
    assert off(z, y) < 1e-10
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (z * direction).sum().backward()
    assert a.grad is not None and b.grad is not None and off(b.grad, a.grad) < 1e-10
    theirs, keys = dict(original.named_parameters()), key_map(model.config, origin_of(model).layout)
    for ours, parameter in model.named_parameters():
        expected = theirs[keys[ours]].grad
        assert parameter.grad is not None and expected is not None
        assert off(parameter.grad, expected) < 1e-10, ours
    back, state = export(model, CASES[name].family), original.state_dict()
    for key in state:  # running statistics, after one forward pass in train mode each
        assert off(back[key].double(), state[key].double()) < 1e-10, key


class Renamed(nn.Module):
    """A network under the names of a FastUNet: its own modules, each at the other's path, and its own forward."""

    def __init__(self, network: nn.Module, paths: dict[str, str]) -> None:
        super().__init__()
        self.network = [network]  # in a list, so that its own names do not count
        for ours, theirs in paths.items():
            *parents, name = ours.split(".")
            place: nn.Module = self
            for parent in parents:
                if parent not in dict(place.named_children()):
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(name, network.get_submodule(theirs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network[0](x)


def with_dtypes() -> Iterator[Any]:
    """Each variant in float32, and one of each family in the others, which take their time on a CPU."""
    families = set()
    for name, case in CASES.items():
        narrow = [] if case.family in families else [torch.bfloat16, torch.float16]
        families.add(case.family)
        for dtype in (torch.float32, *narrow):
            yield pytest.param(name, dtype, id=f"{str(dtype).removeprefix('torch.')}-{name}")


@pytest.mark.parametrize("name, dtype", [*with_dtypes()])
def test_parity_by_the_rule_in_working_dtypes(name, dtype, seed):
    """Output and every gradient against the original; every layer too against the reference."""
    original = make(name)
    model = fastunet.convert(original)
    x = image(original, CASES[name].size)
    renamed = Renamed(original, dict(paths(model.config, origin_of(model).layout))).eval()
    # One has a pooled map that nothing reads, of which verify cannot impose the decisions.
    gradients = name != "seed four levels"
    report = fastunet.verify(model, renamed, x, dtype=dtype, gradients=gradients, deterministic=False)
    assert report.ok, str(report)
    parameters = {name for name, _ in model.named_parameters()}
    compared = {c.name for c in report.comparisons if c.kind == "gradient"}
    assert compared == ({"input", *parameters} if gradients else set())
    reference = UNet.from_config(model.config).eval()
    reference.load_state_dict(model.state_dict())
    report = fastunet.verify(model, reference, x, dtype=dtype, gradients=not gradients, deterministic=False)
    assert report.ok, str(report)
    assert gradients or parameters <= {c.name for c in report.comparisons}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.any_size])
def test_every_size(name, seed):
    """What a pooling drops, a pad or a crop must make up for as the original does."""
    original = make(name).double()
    model = fastunet.convert(original)
    least = model.config.minimum_size

    @settings(max_examples=5, deadline=None)
    @given(st.integers(least, least + 34), st.integers(least, least + 34))
    def check(height: int, width: int) -> None:
        if model.config.norm == "instance":  # which wants more than one pixel at the bottleneck
            height = max(height, 2 * least)
        x = image(original, (height, width), batch=1)
        with torch.no_grad():
            assert off(model(x), original(x)) < 1e-10

    check()


@ALL
def test_round_trip_is_bitwise(name, seed, tmp_path):
    """Module, state_dict and file: the original keys, all of them, with the original bits."""
    original = make(name)
    state = original.state_dict()
    for made in (fastunet.convert(original), fastunet.convert(state)):
        back = export(made, CASES[name].family)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], value) and back[key].dtype == value.dtype for key, value in state.items())
    torch.save(state, tmp_path / "theirs.pth")
    weights.save(fastunet.convert(tmp_path / "theirs.pth"), tmp_path / "ours.safetensors")
    for loaded in (weights.load(tmp_path / "ours.safetensors"), fastunet.convert(tmp_path / "ours.safetensors")):
        back = export(loaded, CASES[name].family)
        assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())


@ALL
def test_trained_here_and_taken_home(name, seed):
    """A step of SGD in FastUNet; the original, given the weights, computes what FastUNet does."""
    original = make(name).double()
    model = fastunet.convert(original).train()
    x = image(original, CASES[name].size)
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    model(x).square().mean().backward()
    optimiser.step()
    model.eval()
    before = original(x).detach()
    original.load_state_dict(export(model, CASES[name].family))
    with torch.no_grad():
        assert off(original(x), model(x)) < 1e-10
        assert off(original(x), before) > 1e-6


@ALL
def test_a_new_network_of_the_family(name, seed):
    """Of a FastUNet that never was one of theirs: its weights load strictly into their module."""
    original = make(name).double()
    config = fastunet.convert(original).config
    fresh = fastunet.FastUNet.from_config(config).double().eval()
    state = export(fresh, CASES[name].family)
    if CASES[name].family == "seed":  # whose names are the author's own, so that FastUNet's serve
        again = fastunet.convert(state)
        assert again.config == config and again.state_dict().keys() == fresh.state_dict().keys()
        assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in again.state_dict().items())
        return
    original.load_state_dict(state)
    x = image(original, CASES[name].size)
    with torch.no_grad():
        assert off(fresh(x), original(x)) < 1e-10


def test_batch_norm_is_folded_for_inference_alone(seed):
    original = make("milesial")
    model = fastunet.convert(original)
    x = image(original, (32, 32))
    with torch.no_grad():
        model(x)
    _, bias = model._prepared[model.bottleneck.net[0]].weights[torch.float32, False, False]  # type: ignore[index]
    assert bias is not None  # of a convolution without one
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == dict(model.named_parameters()).keys()


def test_frozen_parameters_stay_frozen():
    original = make("milesial")
    for parameter in original.inc.parameters():  # type: ignore[union-attr]
        parameter.requires_grad_(False)
    model = fastunet.convert(original)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("downs.0.")}


def test_the_original_is_left_alone(seed):
    original = make("nnunet")
    before = {key: value.clone() for key, value in original.state_dict().items()}
    model = fastunet.convert(original)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())


def test_deep_supervision_gives_the_full_resolution(seed):
    original = CASES["nnunet"].make()
    original.decoder.deep_supervision = True  # type: ignore[union-attr]
    x = image(original, (20, 28))
    with torch.no_grad():
        torch.testing.assert_close(fastunet.convert(original.eval())(x), original(x)[0])
