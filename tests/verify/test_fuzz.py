"""Random networks hold, and one that does not is found and made small."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fastunet import UNetConfig, dispatch, reference
from fastunet.ops import forward
from fastunet.parity import Report, verify
from fastunet.parity.fuzz import DTYPES, LAYOUTS, Case, Fuzzed, fuzz

SIMPLE = Case(UNetConfig(1, 1, (1, 1), align_corners=False), False, 1, 2, 2, "contiguous", "float32", 0, 0, 0)


# Fixed seeds: what is drawn here is repeated by whoever runs the suite; `fastunet verify --fuzz` draws afresh.
SEEDS = pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.fuzz) for seed in range(2, 11))])


@pytest.mark.slow
@SEEDS
def test_500_random_networks_hold(seed):
    found = fuzz(50, seed)
    assert found.case is None, f"{found.case}\n{found.finding}"
    assert found.passed == 50


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted where they can run")
@SEEDS
def test_200_random_networks_hold_in_the_interpreter(seed):
    with dispatch.forced("triton"):
        found = fuzz(20, seed)
    assert found.case is None, f"{found.case}\n{found.finding}"
    assert found.passed == 20


# Each was drawn, and told that it did not hold, before the rule knew how large the terms of its gradients were.
FALSE_ALARMS = {
    "a-channel-almost-dead-behind-a-skip": Case(
        UNetConfig(1, 1, (1, 35, 1, 2), "nearest", False, encoder_convs=(1, 1, 1, 1), final_activation="sigmoid"),
        False, 1, 8, 8, "contiguous", "float32", 0, 4, 1,
    ),
    "a-sigmoid-of-large-logits": Case(
        UNetConfig(1, 1, (3, 36, 2, 1), "nearest", False, encoder_convs=(1, 1, 1, 1), final_activation="sigmoid"),
        False, 1, 8, 8, "contiguous", "float32", 0, 4, 5,
    ),
    "its-error-in-every-gradient": Case(
        UNetConfig(1, 1, (23, 28, 20), "bilinear_conv", False, final_activation="sigmoid"),
        False, 1, 5, 4, "contiguous", "float32", 0, 5, 29899967,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FALSE_ALARMS.values(), ids=FALSE_ALARMS)
def test_what_was_a_false_alarm_holds(case):
    report = case.check("cpu")
    assert report.ok, str(report)


@pytest.mark.cuda
@pytest.mark.parametrize("seed", range(4))
def test_20_random_networks_hold_on_a_gpu(seed):
    """Each compiles kernels of its own, which takes longer than all else; `fastunet verify --fuzz` tries more."""
    found = fuzz(5, seed, "cuda")
    assert found.case is None, f"{found.case}\n{found.finding}"


def test_a_fault_is_found_and_made_small(monkeypatch):
    def fault(x, skip, weight, bias, mode, align_corners, slope, *_):
        y = reference.upsample_concat_conv2d_relu(x, skip, weight, bias, mode, align_corners, slope)
        return y * 2 if mode == "nearest" and skip.shape[1] > 2 else y

    class Faulty:
        def __getattr__(self, name):
            return fault if name == "upsample_concat_conv2d_relu" else getattr(reference, name)

    def forward_alone(*networks, dtype, on_result, **_):
        """Hundreds of cases are tried."""
        return verify(*networks, dtype=dtype, on_result=on_result, gradients=False, deterministic=False)

    monkeypatch.setattr(forward, "reference", Faulty())
    monkeypatch.setattr("fastunet.parity.fuzz.verify", forward_alone)
    seen: list[Fuzzed] = []
    found = fuzz(200, 7, on_progress=seen.append)
    assert isinstance(found.finding, Report) and found.case is not None
    assert found.finding.first_failure is not None and found.finding.first_failure.name.startswith("ups.")
    # All but what the fault needs is as simple as a case can be.
    case = found.case
    assert (case.network.upsample, case.network.features[0]) == ("nearest", 3)
    assert (case.network.depth, case.batch, case.network.in_channels, case.layout) == (1, 1, 1, "contiguous")
    assert case.network.changes().keys() <= {"out_channels", "features", "upsample", "align_corners", "encoder_convs"}
    assert not Case.from_json(case.to_json()).check("cpu").ok
    passing = [so_far.passed for so_far in seen if so_far.case is None]
    assert passing == list(range(1, found.passed + 1))
    # Who interrupts the search for a simpler case has the simplest so far.
    failing = [so_far for so_far in seen if so_far.case is not None]
    assert len(failing) > 1 and failing[-1] == found


def test_a_crash_is_a_finding(monkeypatch):
    monkeypatch.setattr(forward, "reference", None)
    found = fuzz(5, 0)
    assert isinstance(found.finding, AttributeError)
    assert found.passed == 0 and found.case is not None


def test_the_same_seed_draws_the_same_networks(monkeypatch):
    drawn: list[Case] = []
    monkeypatch.setattr(Case, "check", lambda case, device: drawn.append(case) or SIMPLE_REPORT)
    for seed in (3, 3, 4):
        fuzz(20, seed)
    assert drawn[:20] == drawn[20:40] != drawn[40:]


SIMPLE_REPORT = SIMPLE.check("cpu")


def test_every_option_of_a_network_is_drawn(monkeypatch):
    drawn: list[Case] = []
    monkeypatch.setattr(Case, "check", lambda case, device: drawn.append(case) or SIMPLE_REPORT)
    fuzz(300, 5)
    for field in dataclasses.fields(UNetConfig):
        assert len({getattr(case.network, field.name) for case in drawn}) > 1, field.name
    for case in drawn:
        assert Case.from_json(case.to_json()) == case


def test_equal_cases_are_equal_to_the_bit():
    ours, theirs = (SIMPLE.networks("cpu")[0].state_dict() for _ in range(2))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(SIMPLE.inputs("cpu"), SIMPLE.inputs("cpu"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_alike_in_every_layout(layout, dtype):
    network = dataclasses.replace(SIMPLE.network, in_channels=3)
    case = dataclasses.replace(SIMPLE, network=network, batch=2, height=4, width=5, dtype=dtype)
    x = dataclasses.replace(case, layout=layout).inputs("cpu")
    wanted = case.inputs("cpu")
    assert x.shape == wanted.shape and x.dtype == DTYPES[dtype]
    assert torch.equal(x[0], wanted[0])
    contiguous = {"contiguous": x.is_contiguous(), "channels_last": x.is_contiguous(memory_format=torch.channels_last)}
    assert contiguous.get(layout, not x.is_contiguous())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": "int8"}, "expected a dtype of"),
        ({"layout": "round"}, "a layout of"),
        ({"network": {"features": [0, 1]}}, "features"),
        ({"batch": 0}, "batch: expected at least 1"),
        ({"height": 1}, "height: expected at least 2"),
        ({"width": "2"}, "expected integers for"),
        ({"seed": -1}, "a seed of at least 0"),
        ({"novel": 1}, "expected an object with"),
    ],
)
def test_what_is_no_case_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Case.from_json(json.dumps({**SIMPLE.to_dict(), **change}))
