"""What measured tables say: which implementation is chosen, which files are taken. The device is a stand-in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastunet import dispatch, kernels, measured, ops
from fastunet.config import UNetConfig
from fastunet.explain import explain_config
from fastunet.measured import Entry
from fastunet.ops import launchers
from fastunet.trace import trace
from fastunet.tune import save

from .h200 import BF16, CONFIG, CONFIG_FIELDS, GPU, KEY, LAYER, choice, stand_in


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

    def test_a_table_may_give_hopper_the_gradient_of_an_input(self):
        entry = Entry("hopper", {"hopper": 2.0, "triton": 3.0})
        save(measured.cache_path(GPU), GPU, {f"{step} of {KEY}": entry for step in ("dgrad", "wgrad")})
        assert choice(step="dgrad") == dispatch.Choice("hopper", "measured, in microseconds: hopper 2, triton 3", entry)
        assert choice(step="wgrad").reason.endswith("a table says hopper, but it gives no gradient")

    @pytest.mark.parametrize(
        "layer, why",
        [
            (LAYER, None),
            (("upsample_concat_conv2d_relu", ((1, 64, 16, 16), (1, 8, 32, 32)), (64, 72, 3, 3)), None),
            (("upsample_concat_conv2d_relu", ((1, 64, 16, 16), (1, 4, 32, 32)), (64, 68, 3, 3)), "multiples of 8"),
            (("conv_transpose2x2", ((1, 64, 16, 16),), (64, 32, 2, 2)), "a transposed convolution's input"),
        ],
        ids=["plain", "two sources", "few channels", "transposed"],
    )
    def test_the_gradient_of_an_input_is_asked_for(self, layer, why):
        op, maps, weight = layer
        with dispatch.forced("hopper"):
            found, other = (ops.choose(op, maps, weight, GPU, BF16, step=step) for step in ("dgrad", "wgrad"))
        assert found.implementation == ("triton" if why else "hopper") and (why or "asked for") in found.reason
        assert other == dispatch.Choice("triton", "hopper kernels were asked for")

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

    def test_a_step_of_a_backward_pass_is_asked_for_once_too(self, monkeypatch):
        asked = []
        monkeypatch.setattr(launchers, "choose", lambda *a: asked.append(a) or ops.choose(*a))
        found = lambda step: launchers.chosen(*LAYER, GPU, BF16, "none", step).implementation
        assert [found("dgrad") for _ in range(3)] == ["triton"] * 3 and len(asked) == 1
        assert [found("wgrad") for _ in range(3)] == ["triton"] * 3 and len(asked) == 2
        with dispatch.forced("torch", "dgrad"):
            assert (found("dgrad"), found("wgrad"), found("dgrad")) == ("torch", "triton", "torch") and len(asked) == 3
        assert found("dgrad") == "triton" and len(asked) == 3

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
