"""Measured tables: what is chosen, what is kept, what is ignored. The device and the timer are stand-ins."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import hopper as hopper_script
from fastunet import FastUNet, dispatch, kernels, measured, ops
from fastunet.config import UNetConfig
from fastunet.explain import explain_config
from fastunet.measured import Entry
from fastunet.ops import launchers
from fastunet.parity.launches import Launch, launches
from fastunet.trace import trace
from fastunet.tune import measure, save, tune

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16
LAYER = "conv2d_relu", ((1, 64, 32, 32),), (64, 64, 3, 3)
KEY = "conv2d_relu 1x64x32x32 by 64x64x3x3 bfloat16"
CONFIG = kernels.hopper.hopper_configs((64,), 64, 1, 32, 32, BF16, ksize=3, pool=False)[0]
CONFIG_FIELDS = {field: getattr(CONFIG, field) for field in CONFIG.__dataclass_fields__}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As much of an H200 as a choice asks about, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    measured.table.cache_clear()
    yield
    measured.table.cache_clear()


def choice(**options) -> dispatch.Choice:
    return ops.choose(*LAYER, GPU, options.pop("dtype", BF16), **options)


def stand_in(*shape: int) -> Any:
    """As much of a tensor on a GPU as a choice asks about."""
    return SimpleNamespace(shape=torch.Size(shape), device=GPU, dtype=BF16)


@pytest.mark.usefixtures("hopper")
class TestChoice:
    def test_without_a_table_the_portable_kernels(self):
        assert choice().implementation == "triton"
        assert choice().reason == "fused kernel; no measurement of this device yet"

    @pytest.mark.parametrize("fastest", ["hopper", "triton", "torch"])
    def test_a_table_decides(self, fastest):
        config = CONFIG_FIELDS if fastest == "hopper" else None
        save(measured.cache_path(GPU), GPU, {KEY: Entry(fastest, {"triton": 20.0, fastest: 12.4}, config)})
        assert choice().implementation == fastest
        assert choice().reason.startswith("measured, in microseconds: " + f"{fastest} 12")
        other = ops.choose("conv2d_relu", ((2, 64, 32, 32),), (64, 64, 3, 3), GPU, BF16)
        assert other == dispatch.Choice("triton", "fused kernel; no measurement of this layer's shape yet")

    @pytest.mark.parametrize("implementation", ["commuted", "hopper commuted"])
    def test_upsampling_behind_the_products_is_for_layers_that_upsample(self, implementation):
        layer = "upsample_concat_conv2d_relu", ((1, 128, 16, 16), (1, 64, 32, 32)), (64, 192, 3, 3), GPU, BF16
        entry = Entry(implementation, {implementation: 3.0, "triton": 4.0})
        keys = [measured.layer_key(*layer[:3], BF16, mode) for mode in ("bilinear", "none")]
        save(measured.cache_path(GPU), GPU, dict.fromkeys((*keys, KEY), entry))
        assert ops.choose(*layer, "bilinear") == dispatch.Choice(
            implementation, f"measured, in microseconds: {implementation} 3, triton 4", entry
        )
        for other in (ops.choose(*layer, "none"), choice()):
            assert other.implementation == "triton"
            assert f"says {implementation}, but it upsamples nothing" in other.reason
        with dispatch.forced(implementation):
            assert ops.choose(*layer, "nearest") == dispatch.Choice(implementation, "asked for")
            assert choice() == dispatch.Choice("triton", f"{implementation} was asked for, but it upsamples nothing")
            assert ops.choose(*layer, "nearest", "dgrad").implementation == "triton"

    def test_a_table_decides_each_step_by_itself(self):
        save(measured.cache_path(GPU), GPU, {f"wgrad of {KEY}": Entry("torch", {"triton": 20.0, "torch": 12.4})})
        assert choice(step="wgrad") == dispatch.Choice(
            "torch", "measured, in microseconds: torch 12, triton 20", Entry("torch", {"triton": 20.0, "torch": 12.4})
        )
        assert [choice(step=step).implementation for step in ("forward", "dgrad")] == ["triton", "triton"]
        with dispatch.forced("triton", "wgrad"):
            assert choice(step="wgrad") == dispatch.Choice("triton", "asked for")

    def test_the_launcher_gets_the_measured_configuration(self, monkeypatch):
        save(measured.cache_path(GPU), GPU, {KEY: Entry("hopper", {"hopper": 1.0}, CONFIG_FIELDS)})
        x = torch.empty(1, 64, 32, 32, dtype=BF16, device="meta")
        monkeypatch.setattr(launchers, "choose", lambda *a, real=ops.choose, **k: real(*a[:3], GPU, *a[4:], **k))
        launcher = launchers.launcher("conv_fwd", "conv2d_relu", (x,), torch.empty(64, 64, 3, 3), None)
        assert launcher.func is kernels.hopper.conv_fwd
        assert launcher.keywords == {"config": CONFIG}

    @pytest.mark.parametrize(
        "changes", [{"block_co": 7}, {"halo": not CONFIG.halo}, {"stages": 3}], ids=["tile", "triton", "field"]
    )
    def test_a_configuration_that_is_not_offered_is_not_launched(self, monkeypatch, changes):
        """A shipped table may come from another version, or a Triton that takes other ones."""
        save(measured.cache_path(GPU), GPU, {KEY: Entry("hopper", {"hopper": 1.0}, CONFIG_FIELDS | changes)})
        x = torch.empty(1, 64, 32, 32, dtype=BF16, device="meta")
        monkeypatch.setattr(launchers, "choose", lambda *a, real=ops.choose, **k: real(*a[:3], GPU, *a[4:], **k))
        launcher = launchers.launcher("conv_fwd", "conv2d_relu", (x,), torch.empty(64, 64, 3, 3), None)
        assert launcher.func is kernels.hopper.conv_fwd
        assert launcher.keywords == {"config": None}

    def test_a_launch_asks_once_until_something_changes(self, monkeypatch):
        asked = []
        monkeypatch.setattr(launchers, "choose", lambda *a, **k: asked.append(a) or ops.choose(*a, **k))
        x, weight = (stand_in(*shape) for shape in (LAYER[1][0], LAYER[2]))

        def found(**options):
            return launchers.launcher("conv_fwd", "conv2d_relu", (x,), weight, None, **options)

        assert [found() for _ in range(3)] == [kernels.conv_fwd] * 3 and len(asked) == 1
        save(measured.cache_path(GPU), GPU, {KEY: Entry("torch", {"torch": 1.0, "triton": 2.0})})
        assert [found() for _ in range(3)] == [None] * 3 and len(asked) == 2
        with dispatch.forced("hopper"):
            assert [found().func for _ in range(3)] == [kernels.hopper.conv_fwd] * 3 and len(asked) == 3
        assert found() is None and len(asked) == 3
        for changed in ({"stride": (2, 1)}, {"padding": "valid"}):
            assert [found(**changed).func for _ in range(3)] == [kernels.conv_fwd] * 3
        assert len(asked) == 5
        x.shape = torch.Size((2, 64, 32, 32))
        assert [found() for _ in range(3)] == [kernels.conv_fwd] * 3 and len(asked) == 6
        monkeypatch.setattr(launchers, "_REMEMBERED", 4)
        x.shape = torch.Size((3, 64, 32, 32))
        assert [found() for _ in range(3)] == [kernels.conv_fwd] * 3 and len(measured.table(GPU).choices) == 1

    def test_forced(self):
        with dispatch.forced("hopper"):
            assert choice() == dispatch.Choice("hopper", "asked for")
            stem = ops.choose("conv2d_relu", ((1, 1, 32, 32),), (64, 1, 3, 3), GPU, BF16)
            assert (stem.implementation, "multiples of 8" in stem.reason) == ("triton", True)
        save(measured.cache_path(GPU), GPU, {KEY: Entry("hopper", {"hopper": 1.0}, CONFIG_FIELDS)})
        with dispatch.forced("triton"):
            assert choice().implementation == "triton"

    def test_another_gpu_cannot_be_forced_and_ignores_the_word_hopper(self, monkeypatch):
        save(measured.cache_path(GPU), GPU, {KEY: Entry("hopper", {"hopper": 1.0}, CONFIG_FIELDS)})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert choice().implementation == "triton"
        assert "compute capability 8.0 is not 9.0" in choice().reason
        other = ops.choose("conv2d_relu", ((2, 64, 32, 32),), (64, 64, 3, 3), GPU, BF16)  # of which no table speaks
        assert other.reason.endswith("yet; no Hopper kernels, for compute capability 8.0 is not 9.0")
        with dispatch.forced("hopper"), pytest.raises(RuntimeError, match=r"asked for, but compute capability 8\.0"):
            choice()

    def test_explain_shows_each_layers_choice(self):
        key = "conv2d_relu 1x64x64x64 by 64x64x3x3 bfloat16"
        save(measured.cache_path(GPU), GPU, {key: Entry("hopper", {"hopper": 3.0, "torch": 9.0}, CONFIG_FIELDS)})
        rows = explain_config(UNetConfig(1, 2), (1, 1, 64, 64), GPU, BF16).rows
        found = {row.layer.name: row.choice for row in rows}
        assert found["ups.3.conv.net.2"].implementation == "hopper"
        assert found["ups.3.conv.net.2"].reason == "measured, in microseconds: hopper 3, torch 9"
        assert found["bottleneck.net.0"].implementation == "triton"
        assert found["head"].reason == "fused kernel; no measurement of this layer's shape yet"

    def test_a_head_in_the_same_pass(self):
        """Of what was not measured; else as the table has it, which may know of the layer alone."""
        layer = "conv2d_relu_head", LAYER[1], LAYER[2], GPU, BF16
        unmeasured = "fused kernel; no measurement of this device yet"
        assert ops.choose(*layer, classes=2) == dispatch.Choice("triton", unmeasured)
        rows = explain_config(UNetConfig(1, 2), (1, 1, 32, 32), GPU, BF16).rows
        assert [row.choice.reason for row in rows[-3:]] == [
            unmeasured, f"{unmeasured}, with the head", "in one pass with ups.3.conv.net.2"
        ]  # fmt: skip
        conv, head = trace(UNetConfig(1, 2), 32, 32)[-2:]
        between = 64 * 32 * 32
        assert [row.bytes for row in rows[-2:]] == [2 * (part.elements - between) for part in (conv, head)]
        entries = {KEY: Entry("hopper", {"hopper": 3.0}, CONFIG_FIELDS)}
        save(measured.cache_path(GPU), GPU, entries)
        apart = ops.choose(*layer, classes=2)
        assert apart == dispatch.Choice("torch", "two passes, of which the first was measured")
        key = "conv2d_relu_head 1x64x32x32 by 64x64x3x3 to 2 bfloat16"
        entries[key] = Entry("hopper", {"hopper": 3.0, "torch": 4.0}, CONFIG_FIELDS)
        save(measured.cache_path(GPU), GPU, entries)
        assert ops.choose(*layer, classes=2).implementation == "hopper"
        assert ops.choose(*layer, classes=3) == apart
        entries["conv2d_relu 1x64x32x32 by 2x64x1x1 bfloat16"] = Entry("torch", {"torch": 2.0})
        save(measured.cache_path(GPU), GPU, entries)
        assert ops.choose(*layer, classes=2).implementation == "hopper"
        entries[KEY] = Entry("torch", {"torch": 0.5})  # with which two passes are faster than one
        save(measured.cache_path(GPU), GPU, entries)
        two = dispatch.Choice("torch", "measured, in microseconds: two passes 0 + 2, one 3")
        assert ops.choose(*layer, classes=2) == two
        launch = launchers.launcher(
            "conv_head_fwd", "conv2d_relu_head", (torch.empty(1, 64, 32, 32, device="meta", dtype=BF16),),
            torch.empty(64, 64, 3, 3, device="meta", dtype=BF16), None, classes=2,
        )  # fmt: skip
        assert launch is None  # on a device without kernels

    def test_with_a_norms_factors_it_is_another_layer(self):
        """cuDNN takes them in a pass of its own, so that what is fastest without them need not be."""
        hopper = Entry("hopper", {"hopper": 2.0, "torch": 3.0}, CONFIG_FIELDS)
        head = "conv2d_relu_head 1x64x32x32 by 64x64x3x3 to 2 bfloat16"
        entries = dict.fromkeys((KEY, head), Entry("torch", {"hopper": 2.0, "torch": 1.0}))
        save(measured.cache_path(GPU), GPU, entries | {f"{key} with factors": hopper for key in entries})
        for classes in (0, 2):
            op = "conv2d_relu_head" if classes else "conv2d_relu"
            chosen = [
                ops.choose(op, *LAYER[1:], GPU, BF16, classes=classes, factors=factors).implementation
                for factors in (False, True)
            ]
            assert chosen == ["torch", "hopper"]
        x, weight = (stand_in(*shape) for shape in (LAYER[1][0], LAYER[2]))
        for bias, launcher in ((torch.empty(64), None), (torch.empty(2, 64), kernels.hopper.conv_fwd), (None, None)):
            found = launchers.launcher("conv_fwd", "conv2d_relu", (x,), weight, bias)
            assert getattr(found, "func", None) is launcher
        for norm, explained in ((None, "torch 1, hopper 2"), ("batch", "hopper 2, torch 3, with the head")):
            row = explain_config(UNetConfig(1, 2, norm=norm), (1, 1, 32, 32), GPU, BF16).rows[-2]
            assert row.choice.reason == f"measured, in microseconds: {explained}"

    @pytest.mark.parametrize("measured_with", [True, False])
    @pytest.mark.parametrize(
        "entry, chosen",
        [
            (Entry("hopper", {"hopper": 2.0, "torch": 2.5, "triton": 3.0}, CONFIG_FIELDS), "hopper 2, triton 3"),
            (Entry("triton", {"triton": 2.0, "hopper": 3.0}), "triton 2, hopper 3"),
            (Entry("torch", {"triton": 3.0, "torch": 1.0, "hopper": 2.0}), "hopper 2, triton 3"),
            (Entry("torch", {"torch": 1.0}), None),
        ],
        ids=["hopper", "triton", "torch", "torch alone"],
    )
    def test_what_was_measured_with_factors_or_without_alone(self, entry, chosen, measured_with):
        """Our kernels cost the same either way; what cuDNN costs is not known."""
        save(measured.cache_path(GPU), GPU, {KEY + measured_with * " with factors": entry})
        found = choice(factors=not measured_with)
        if chosen is None:
            assert found == dispatch.Choice("triton", "fused kernel; no measurement of this layer's shape yet")
            return
        which = "with" if measured_with else "without"
        assert found.reason == f"measured {which} factors, in microseconds: {chosen}"
        assert found.implementation == chosen.split()[0] and found.entry is not None
        assert found.entry.config == (CONFIG_FIELDS if entry.implementation == "hopper" else None)
        assert choice(factors=measured_with).implementation == entry.implementation

    @pytest.mark.parametrize("channels, classes", [(65, 2), (64, 17)])
    def test_a_head_that_no_tile_holds_is_a_pass_of_its_own(self, channels, classes):
        layer = "conv2d_relu_head", LAYER[1], (channels, 64, 3, 3), GPU, BF16
        why = f"no tile holds {channels} channels and {classes} classes"
        assert ops.choose(*layer, classes=classes) == dispatch.Choice("torch", why)


@pytest.mark.usefixtures("hopper")
class TestFiles:
    def test_entries_are_added_and_nothing_else_lies_about(self):
        path = measured.cache_path(GPU)
        save(path, GPU, {"a": Entry("triton", {"triton": 1.0})})
        save(path, GPU, {"b": Entry("torch", {"torch": 2.0})})
        assert set(measured.table(GPU)) == {"a", "b"}
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        assert "H200" in path.name and torch.__version__.partition("+")[0] in path.name

    def test_the_users_table_comes_before_the_shipped_one(self):
        shipped = measured.SHIPPED / "nvidia-h200.json"
        save(shipped, GPU, {"a": Entry("torch", {"torch": 1.0}), "b": Entry("torch", {"torch": 1.0})})
        text = shipped.read_text().replace(torch.__version__, "2.0.0")  # measured with another version
        shipped.write_text(text)
        save(measured.cache_path(GPU), GPU, {"a": Entry("triton", {"triton": 1.0})})
        assert {key: entry.implementation for key, entry in measured.table(GPU).items()} == {
            "a": "triton",
            "b": "torch",
        }

    @pytest.mark.parametrize(
        "content",
        [
            "", "{", "[]", "null", '{"layers": {}}', '{"measured_on": {}, "layers": {}}',
            json.dumps({"measured_on": {"device": "NVIDIA H100"}, "layers": {}}),
        ],
        ids=["empty", "cut-off", "list", "null", "no-versions", "no-device", "another-device"],
    )  # fmt: skip
    def test_a_corrupt_or_foreign_file_is_ignored_with_a_warning(self, content):
        path = measured.cache_path(GPU)
        path.parent.mkdir(parents=True)
        path.write_text(content)
        with pytest.warns(UserWarning, match="not a table of measurements for this machine"):
            assert measured.table(GPU) == {}
        assert choice().implementation == "triton"

    @pytest.mark.parametrize(
        "entry",
        [
            {"implementation": "magic", "microseconds": {}},
            {"implementation": "triton"},
            {"x": 1},
            3,
            {"implementation": "triton", "microseconds": {"triton": "fast"}},
            {"implementation": "triton", "microseconds": {"triton": 1.0, "torch": None}},
            {"implementation": "triton", "microseconds": [1.0]},
            {"implementation": "hopper", "microseconds": {"hopper": 1.0}, "config": [64]},
            {"implementation": "hopper", "microseconds": {"hopper": 1.0}, "config": {"block_co": "64"}},
        ],
        ids=str,
    )
    def test_so_is_one_with_an_entry_that_means_nothing(self, entry):
        path = measured.cache_path(GPU)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"measured_on": measured.versions(GPU), "layers": {KEY: entry}}))
        with pytest.warns(UserWarning, match="ignored"):
            assert measured.table(GPU) == {}

    def test_so_is_one_that_may_not_be_read(self, monkeypatch):
        save(measured.cache_path(GPU), GPU, {KEY: Entry("torch", {"torch": 1.0})})

        def refused(self, **_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_text", refused)
        with pytest.warns(UserWarning, match="ignored: .*Permission denied"):
            assert measured.table(GPU) == {}

    def test_nobodys_home_has_no_table(self, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
        with pytest.warns(UserWarning, match="no table of this user's measurements: Could not determine home"):
            assert measured.table(GPU) == {}


def test_the_fastest_right_one_is_kept(monkeypatch, seed):
    """A faster one that computes something else, or cannot run, is left out."""
    config, device = UNetConfig(8, 8, features=(8, 16), upsample="transpose"), torch.device("cpu")
    calls = []

    def timer(call):
        calls.append(call)
        return 10.0 if len(calls) % 2 else 5.0  # torch, which comes second, is faster

    def wrong(self, config=None):
        result = self.function(*self.tensors)
        return tuple(2 * t for t in result) if isinstance(result, tuple) else 2 * result

    monkeypatch.setattr("fastunet.parity.launches.Launch.run", wrong)
    with pytest.warns(UserWarning, match="left out: NO parity") as warned:
        entries = dict(measure(config, (1, 8, 8), torch.float32, device, timer))
    assert {entry.implementation for entry in entries.values()} == {"torch"}
    assert len(calls) == len(entries) == len(warned)

    calls.clear()
    monkeypatch.setattr("fastunet.parity.launches.Launch.run", lambda self, config=None: self.function(*self.tensors))
    entries = dict(measure(config, (1, 8, 8), torch.float32, device, timer))
    assert all(entry.microseconds == {"triton": 10.0, "torch": 5.0} for entry in entries.values())


def test_a_wrong_pooled_map_is_left_out_too(monkeypatch, seed):
    def wrong(self, config=None):
        result = self.function(*self.tensors)
        return (result[0], -result[1]) if isinstance(result, tuple) else result

    monkeypatch.setattr(Launch, "run", wrong)
    config, tried = UNetConfig(8, 8, features=(8, 16)), list[str]()
    with pytest.warns(UserWarning, match="left out: NO parity"):
        found = dict(measure(config, (1, 8, 8), torch.float32, torch.device("cpu"), lambda _: 1, on_try=tried.append))
    assert {"triton" in entry.microseconds for key, entry in found.items() if "pool" in key} == {False}
    assert all("triton" in entry.microseconds for key, entry in found.items() if "pool" not in key)
    assert tried[:2] == ["downs.0.conv.net.0, triton, None", "downs.0.conv.net.0, torch, None"]


def test_upsampling_behind_the_products_is_timed_too(monkeypatch, seed):
    monkeypatch.setattr(Launch, "run", lambda self, config=None: self.function(*self.tensors))
    found = dict(
        measure(UNetConfig(8, 8, features=(8, 16)), (1, 8, 8), torch.float32, torch.device("cpu"), lambda _: 1)
    )
    upsamples = {key: "bilinear" in key for key in found}
    assert any(upsamples.values())
    assert {key: "commuted" in entry.microseconds for key, entry in found.items()} == upsamples


@pytest.mark.parametrize("dtype, training", [(BF16, False), (BF16, True), (torch.float32, False)], ids=str)
def test_layers_are_timed_with_their_norms_factors(dtype, training, monkeypatch, seed):
    """In eval mode and 16 bits; else the norm is in the weights, or a pass of its own."""
    monkeypatch.setattr(Launch, "run", lambda self, config=None: self.function(*self.tensors))
    config, device = UNetConfig(8, 8, features=(8, 16), norm="batch", upsample="transpose"), torch.device("cpu")
    found = dict(measure(config, (1, 8, 8), dtype, device, lambda _: 1, training=training))
    of_norms = {key: "x3x3" in key for key in found}
    assert any(of_norms.values()) and not all(of_norms.values())
    wanted = of_norms if dtype == BF16 and not training else dict.fromkeys(found, False)
    assert {key: key.endswith(" with factors") for key in found} == wanted


def test_a_backward_pass_is_timed_step_by_step(monkeypatch, seed):
    """Of a layer of two sources both launches count, and a gradient that is another each time does not."""
    config, device = UNetConfig(8, 8, features=(8, 16), upsample="transpose"), torch.device("cpu")
    times = iter([10.0, 5.0] * 100)
    monkeypatch.setattr(Launch, "run", lambda self, config=None: self.function(*self.tensors))
    found = dict(measure(config, (1, 8, 8), torch.float32, device, lambda call: next(times), training=True))
    two_sources = "upsample_concat_conv2d_relu 1x8x8x8 + 1x8x8x8 by 8x16x3x3 float32"
    assert found[f"dgrad of {two_sources}"] == Entry("torch", {"triton": 20.0, "torch": 10.0})
    assert found[f"wgrad of {two_sources}"] == Entry("torch", {"triton": 10.0, "torch": 5.0})
    assert {key.partition(" of ")[0] for key in found if " of " in key} == {"dgrad", "wgrad"}
    assert len(found) % 3 == 0

    def restless(self, config=None):
        result = self.function(*self.tensors)
        return result * (1 + 1e-7 * torch.rand_like(result)) if self.step == "wgrad" else result

    monkeypatch.setattr(Launch, "run", restless)
    with pytest.warns(UserWarning, match="left out: another result the second time"):
        found = dict(measure(config, (1, 8, 8), torch.float32, device, lambda call: 1.0, training=True))
    assert found[f"wgrad of {two_sources}"] == Entry("torch", {"torch": 1.0})


def test_a_deadline_ends_it(seed):
    assert not dict(measure(UNetConfig(8, 8, features=(8, 16)), (1, 8, 8), torch.float32,
                                 torch.device("cpu"), lambda call: 1.0, deadline=0.0))  # fmt: skip


def test_there_is_nothing_to_tune_on_a_cpu():
    with pytest.raises(RuntimeError, match="model: there is nothing to tune"):
        tune(FastUNet(1, 2, (4, 8)), (1, 1, 8, 8))
    with pytest.raises(ValueError, match="model: expected a FastUNet, got int"):
        tune(3, (1, 1, 8, 8))  # pyright: ignore[reportArgumentType]


def a_share(rank, count, dtype, say):
    """As of benchmarks/hopper.py: the first process ends, the second dies, the third hangs."""
    say(f"{rank} a", None)
    say(f"{rank} a", rank != 2)
    say(f"{rank} b", None)
    if rank == 1:
        time.sleep(0.2)  # what it said is on its way
        os._exit(1)
    if rank == 2:
        time.sleep(60)


def test_of_processes_that_check_the_one_that_dies_or_hangs_is_told_by_what_it_was_at(capsys):
    found = hopper_script.check(a_share, BF16, time.monotonic() + 4, 3, method="fork")
    assert found == (2, 3)
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "  2 a",
        "  out of time at 2 b; what would follow is not checked",
        "  process 1 died at 1 b",
    ]


@pytest.mark.usefixtures("hopper")
def test_what_is_timed_is_compiled_before_by_several_processes(monkeypatch):
    """Every candidate by one of them; one that fails keeps nobody from the others."""
    ran = []

    def run(launch, config=None):
        ran.append(config)
        if config == "commuted":
            raise ValueError("too much shared memory")

    monkeypatch.setattr(Launch, "run", run)
    monkeypatch.setattr(dispatch, "why_not_hopper", lambda device: None)
    said: list[tuple[str, bool | None]] = []
    sizes, say = [(1, 16, 16), (1, 32, 48)], lambda *words: said.append(words)
    for rank in range(3):
        hopper_script.compile_share(sizes, "meta", rank, 3, BF16, say)
    wanted = [
        config
        for size in sizes
        for launch in launches(UNetConfig(), size, lambda *shape, fan_in=1: torch.empty(shape, dtype=BF16))
        for config in (None, *launch.hopper, *launch.commuted(True))
    ]
    assert sorted(map(str, ran)) == sorted(map(str, wanted)) and "hopper commuted" in wanted
    assert [held for _, held in said].count(None) == len(wanted)
    failed = [text for text, held in said if held is False]
    assert len(failed) == wanted.count("commuted") and all(text.endswith("ValueError") for text in failed)


@pytest.mark.usefixtures("hopper")
def test_the_script_for_a_hopper_gpu_checks_times_and_writes_the_table(monkeypatch, capsys):
    """benchmarks/hopper.py with a stand-in for what needs the GPU."""
    wrong, said, compiled = 0, list[tuple[str, bool | None]](), []
    comparison = SimpleNamespace(parity=SimpleNamespace(ok=True), name="head", implementation="a config")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(hopper_script, "check_configs", lambda *a, **k: iter([comparison, comparison]))
    monkeypatch.setattr(hopper_script, "check", lambda share, dtype, *_: share(0, 1, dtype, record) or (2, wrong))
    monkeypatch.setattr(hopper_script, "compile_share", lambda sizes, device, *_: compiled.append((sizes, device)))

    def record(text: str, held: bool | None) -> None:
        said.append((text, held))

    key = "conv2d_relu 1x64x32x32 by 64x64x3x3 bfloat16"
    entry = Entry("hopper", {"hopper": 1.0, "torch": 2.0}, CONFIG_FIELDS)
    monkeypatch.setattr(hopper_script, "measure", lambda *a, **k: iter([(key, entry)]))
    monkeypatch.setattr("sys.argv", ["hopper.py", "--dtype", "bf16", "--size", "1x32x32"])
    assert hopper_script.main() == 0
    out = capsys.readouterr().out
    assert "2 of 2 launch configurations hold" in out
    assert "hopper (hopper 1.0, torch 2.0 us), 75 TFLOP/s" in out  # 2 x 9 x 64 x 64 x 1024 in a microsecond
    assert "bf16: 2 candidates compiled, 0 not" in out and compiled == [([(1, 32, 32)], "cuda")]
    assert measured.table(GPU) == {key: entry}
    assert [held for _, held in said] == [True, True] and said[0][0].startswith("head, a config: ")
    wrong = 1
    assert hopper_script.main() == 1
