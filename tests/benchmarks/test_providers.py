"""Every provider computes the case, at its best."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

from benchmarks import measure
from benchmarks.cases import DTYPES, NETWORKS, Case, operators
from benchmarks.providers import OURS, PROVIDERS, Provider, fastunet, settings
from benchmarks.work import Call, Work, make_work
from fastunet import kernels, ops
from fastunet.config import UNetConfig

from ..ops.cases import Names
from .helpers import GOOD, TINY, measured


def traced(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Compile without Inductor, which takes seconds; returns whether each graph was to be frozen."""
    compiled, frozen = torch.compile, []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        frozen.append(torch._dynamo.utils.is_parameter_freezing())
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compiled(function, backend=backend, dynamic=False)
    )
    return frozen


COMPILE = {provider.name: provider for provider in PROVIDERS if provider.name.startswith("compile")}


def test_a_function_compiled_too_often_is_a_failure(monkeypatch):
    """Dynamo would go on in eager, which would then be timed as compiled."""
    traced(monkeypatch)

    def restless(work: Work) -> Call:
        run: Any = torch.compile(work.module)
        sizes = [torch.zeros(1, 1, side, side) for side in range(8, 17)]
        return Call(lambda: tuple(run(x) for x in sizes))

    row = measured(TINY, GOOD[0], Provider("restless", restless))["restless"]
    assert row.state == "failed" and "recompile" in row.reason.lower()


def test_every_case_compiles_anew(monkeypatch):
    graphs = traced(monkeypatch)
    for side in range(8, 17):  # nine, of one code object, which holds eight versions
        found = measured(dataclasses.replace(TINY, height=side), GOOD[0], COMPILE["compile"])
        assert found["compile"].state == "ok"
    assert len(graphs) == 9


@pytest.mark.parametrize("kind", ["infer", "train"])
@pytest.mark.parametrize("name", COMPILE)
def test_compiled_code_freezes_weights_in_inference(kind, name, monkeypatch):
    torch._dynamo.reset()
    frozen = traced(monkeypatch)
    work = make_work(dataclasses.replace(TINY, kind=kind), torch.device("cpu"), 0)
    with settings("fp32"):
        call = COMPILE[name].prepare(work)
        call()
        call()
    assert frozen == [kind == "infer"]  # and the second call compiled nothing


def test_compile_as_it_comes_is_frozen_on_a_cpu_alone(monkeypatch):
    torch._dynamo.reset()
    frozen = traced(monkeypatch)
    work = make_work(TINY, torch.device("cpu"), 0)
    monkeypatch.setattr(Work, "device", torch.device("cuda"))
    COMPILE["compile"].prepare(work)()
    assert frozen == [False]


# --- the providers -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["infer", "train", "op"])
@pytest.mark.parametrize(
    "provider", [p for p in PROVIDERS if p.serves(TINY, "cpu") and p.name != "compile"], ids=lambda p: p.name
)
def test_every_provider_computes_the_case(kind, provider):
    names = operators(NETWORKS["tiny"], 8, 8, 1) if kind == "op" else [None]
    for name in names:
        case = dataclasses.replace(TINY, kind=kind, operator=name)
        if not provider.serves(case, "cpu"):
            continue
        (row,) = measured(case, provider).values()
        assert row.state == "ok", row
        assert row.max_err is not None and row.max_err < 1e-5


@pytest.mark.parametrize("provider", GOOD, ids=lambda p: p.name)
def test_autocast_keeps_float32_weights(provider):
    case = dataclasses.replace(TINY, dtype="bf16", autocast=True)
    work = make_work(case, torch.device("cpu"), 0)
    assert {p.dtype for p in work.module.parameters()} == {torch.float32}
    assert provider.prepare(work)()[0].dtype == torch.bfloat16
    (row,) = measured(case, provider).values()
    assert row.state == "ok" and row.case.endswith(" bf16 autocast")


def test_each_rung_fuses_one_operator_more():
    found = []
    for provider in (p for p in PROVIDERS if p.name in OURS):
        call = provider.prepare(make_work(TINY, torch.device("cpu"), 0))
        with ops.watched(), Names() as names:
            call()
        found.append({name for name in names.seen if name.startswith("fastunet::")})
    conv, pool, concat, fused = (f"fastunet::{name}" for name in OPERATORS)
    assert found == [{conv}, {conv, pool}, {conv, pool, concat}, {conv, pool, fused}]


OPERATORS = ("conv2d_relu", "conv2d_relu_pool", "upsample_concat", "upsample_concat_conv2d_relu")


def test_training_steps_train():
    case = dataclasses.replace(TINY, kind="train")
    for provider in GOOD:
        step = provider.prepare(make_work(case, torch.device("cpu"), 0))
        losses = [step()[0].item() for _ in range(40)]
        assert losses[-1] < losses[0]


def test_a_restarted_step_begins_with_the_first_weights():
    work = make_work(dataclasses.replace(TINY, kind="train"), torch.device("cpu"), 0)
    step = fastunet(work)
    first = measure.copied(step())
    step()
    step.restart(work)
    assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_every_provider_compiles_for_itself(monkeypatch, tmp_path):
    class Kernel:
        device_caches: ClassVar = {"cuda:0": "compiled"}

    monkeypatch.setattr(kernels.conv3x3, "a_kernel", Kernel(), raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "theirs")
    with measure.own_caches() as folder:
        measure.forget_compiled(folder)
        one = os.environ["TRITON_CACHE_DIR"]
        measure.forget_compiled(folder)
        two = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert one != two and not os.path.exists(one)
    assert os.environ["TRITON_CACHE_DIR"] == "theirs" and Kernel.device_caches == {}


(CUDNN,) = (provider for provider in PROVIDERS if provider.name == "cudnn fused")


def test_cudnn_fused_takes_a_stem_of_few_channels(monkeypatch):
    """cuDNN has no engine for it; the CPU, which has no such operator, shows who is asked."""
    asked = []

    def fused(x, weight, bias, *_):
        asked.append(x.shape[1])
        return torch.relu_(torch.nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2))

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    monkeypatch.setitem(NETWORKS, "tiny", UNetConfig(features=(8, 9)))
    assert measured(TINY, GOOD[0], CUDNN)["cudnn fused"].state == "ok"
    assert set(asked) == {8, 9, 17}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("network", ["small-milesial", "small-transpose"])
def test_cudnn_fused_folds_batch_norms(network, autocast, monkeypatch):
    asked = []

    def fused(x, weight, bias, *_):
        asked.append((x.dtype, weight.dtype))
        return torch.relu_(torch.nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2))

    def no_norm(*_, **__):
        raise AssertionError("a batch norm that is not folded")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    case = Case("infer", network, "bf16", 1, 32, 48, autocast=autocast)
    assert CUDNN.serves(case, "cuda")
    work = make_work(case, torch.device("cpu"), 0)
    with settings("bf16"):
        baseline, truth = measure.baseline_of(work), measure.truth_of(work)
        monkeypatch.setattr(torch.nn.functional, "batch_norm", no_norm)
        results = CUDNN.prepare(work)()
    parity = measure.check(results, baseline, truth, case)
    assert parity.ok, parity
    assert set(asked) == {(torch.bfloat16, torch.bfloat16)} and len(asked) == 17  # all but the stem


def test_work_is_the_same_for_the_same_seed():
    one, two = (make_work(TINY, torch.device("cpu"), 3) for _ in range(2))
    assert torch.equal(one.inputs[0], two.inputs[0])
    assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), two.module.parameters(), strict=True))
    assert one.inputs[0].dtype == DTYPES[TINY.dtype]
