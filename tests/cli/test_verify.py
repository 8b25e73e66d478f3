"""``fastunet verify`` as its user meets it."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastunet
from fastunet import FastUNet, UNetConfig, kernels, reference, weights
from fastunet.ops import forward
from fastunet.parity.fuzz import Fuzzed

SMALL = '{"in_channels": 1, "features": [3, 4], "align_corners": false}'
CASE = (
    '{"network":{"out_channels":1,"features":[1,1],"align_corners":false},"training":false,"batch":1,"height":2,'
    '"width":2,"layout":"contiguous","dtype":"float32","weight_scale":0,"input_scale":0,"seed":0}'
)
NO_BATCH = CASE.replace('"batch":1', '"batch":0')
QUICK = ("--config", SMALL, "--size", "8x10", "--batch", "1")


@pytest.fixture(autouse=True)
def torch_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite sets TRITON_INTERPRET for the kernels' tests; users seldom do."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's fused operator is wrong."""

    class Faulty:
        def __getattr__(self, name):
            right = getattr(reference, name)
            return right if name != "upsample_concat_conv2d_relu" else lambda *a: right(*a) + 0.01

    monkeypatch.setattr(forward, "reference", Faulty())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "plate"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, size in (("a", (20, 17)), ("b", (33, 40)), ("c", (19, 18))):
        Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def test_the_shipped_model_holds(run):
    shown = run("verify", "--size", "32", "--batch", "1")
    assert (shown.code, shown.err) == (0, "")
    assert "float32 on cpu, input 1x1x32x32" in shown.out
    assert "gradient input" in shown.out
    assert shown.out.endswith("\nparity\n")


def test_files_are_written(run, tmp_path):
    data, picture = tmp_path / "report.json", tmp_path / "error.png"
    shown = run("verify", *QUICK, "--dtype", "bf16", "--json", data, "--plot", picture)
    assert shown.code == 0
    found = json.loads(data.read_text())
    assert found["ok"] is True and found["interrupted"] is False
    assert found["report"]["dtype"] == "bfloat16"
    assert found["report"]["comparisons"][0]["name"] == "downs.0.conv.net.0"
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["error.png", "report.json"]


def test_what_does_not_hold_is_said_with_a_command_that_repeats_it(run, broken, tmp_path):
    shown = run("verify", *QUICK, "--seed", "3", "--json", tmp_path / "report.json")
    assert shown.code == 1
    assert "first to break the rule: layer ups.0.conv.net.0, on torch" in shown.out
    assert shown.out.endswith("\nNO parity\n")
    (again,) = [line.removeprefix("again: ") for line in shown.out.splitlines() if line.startswith("again: ")]
    program, *words = shlex.split(again)
    repeated = run(*words)
    assert program == "fastunet" and repeated.code == 1
    assert repeated.out == shown.out
    assert json.loads((tmp_path / "report.json").read_text())["report"]["command"] == again


def test_the_picture_shows_where_the_error_is(run, monkeypatch, tmp_path):
    class Seam:
        def __getattr__(self, name):
            right = getattr(reference, name)

            def seam(x, weight, bias, slope, *_):
                y = right(x, weight, bias, slope)
                y[..., y.shape[3] // 2] += 0.1
                return y

            return seam if name == "conv2d_relu" else right

    path = tmp_path / "wrong.png"
    monkeypatch.setattr(forward, "reference", Seam())
    assert run("verify", *QUICK, "--plot", path).code == 1
    pixels = np.asarray(Image.open(path).convert("L"), dtype=float)
    height, width = pixels.shape
    candidate = pixels[height // 3 : height * 2 // 3, int(width * 0.1) : int(width * 0.4)]
    baseline = pixels[height // 3 : height * 2 // 3, int(width * 0.55) : int(width * 0.8)]
    # Errors of 0.1 are bright, roundings dark: the seam is on the left alone.
    assert np.mean(candidate, axis=0).max() > np.mean(baseline, axis=0).max() + 50


def test_images_are_cropped_to_what_they_share(run, images):
    shown = run("verify", "--config", SMALL, "--images", images, "--batch", "8")
    assert shown.code == 0
    assert "input 3x1x19x17" in shown.out
    assert "input 2x1x12x14" in run("verify", "--config", SMALL, "--images", images, "--size", "12x14").out


def test_a_file_without_configuration_and_its_configuration(run, tmp_path):
    config = UNetConfig(features=(3, 4), norm="batch")
    torch.save(FastUNet.from_config(config).state_dict(), tmp_path / "mine.pt")
    (tmp_path / "mine.json").write_text(config.to_json())
    shown = run("verify", "--weights", tmp_path / "mine.pt", "--config", tmp_path / "mine.json", "--size", "8")
    assert shown.code == 0, shown


FACTORY = """
import torch
from fastunet.reference import UNet

class Own(torch.nn.Module):
    def __init__(self, out):
        super().__init__()
        self.net = UNet(1, out, (3, 4), align_corners=False)
    def forward(self, x):
        return self.net(x)

def same():
    return UNet(1, 2, (3, 4), align_corners=False)

def own():
    return Own(2)

def other_classes():
    return Own(3)

class Clamped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3, padding=1)
    def forward(self, x):
        return self.conv(x).clamp(min=0)

def clamped():
    return Clamped()

def number():
    return 3

def crash():
    raise OSError("no weights here")

def leave():
    raise SystemExit(0)

class Late(Own):
    def forward(self, x):
        raise KeyError("layer")

def late():
    return Late(2)
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "mylab_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mylab_models", raising=False)


def test_a_reference_of_ones_own(run, factory):
    shown = run("verify", *QUICK, "--factory", "mylab_models:same")
    assert shown.code == 0
    assert "reference: mylab_models:same, with the model's weights, as its parameters have their names\n" in shown.out
    shown = run("verify", *QUICK, "--factory", "mylab_models:own")
    assert shown.code == 1
    assert "reference: mylab_models:own, with its own weights\n" in shown.out
    assert "output logits" in shown.out and "layer" not in shown.out.partition("output")[0]


def test_gradients_can_be_left_out(run, factory):
    words = ("verify", *QUICK, "--factory", "mylab_models:clamped")
    shown = run(*words)
    assert shown.code == 2 and "; --no-gradients leaves them out" in shown.err
    shown = run(*words, "--no-gradients")
    assert shown.code == 1 and "gradient input" not in shown.out
    assert "not compared: gradients (not asked for)" in shown.out
    assert any(line.startswith("again: ") and line.endswith(" --no-gradients") for line in shown.out.splitlines())


@pytest.mark.parametrize(
    "name, message",
    [
        ("mylab_models", "expected PACKAGE.MODULE:FUNCTION, got 'mylab_models'"),
        ("mylab_models:none", "mylab_models:none failed (AttributeError"),
        ("no_such_lab:unet", "no_such_lab:unet failed (ModuleNotFoundError"),
        ("mylab_models:crash", "mylab_models:crash failed (OSError: no weights here)"),
        ("mylab_models:leave", "mylab_models:leave failed (SystemExit: 0)"),
        ("mylab_models:late", "the networks could not be run (KeyError: 'layer')"),
        ("mylab_models:number", "expected mylab_models:number to return an nn.Module, got int"),
    ],
)
def test_a_factory_that_does_not_work(run, factory, name, message):
    shown = run("verify", *QUICK, "--factory", name)
    assert shown.code == 2 and len(shown.errors) == 1 and message in shown.err


def test_outputs_of_another_shape(run, factory):
    shown = run("verify", *QUICK, "--factory", "mylab_models:other_classes")
    assert shown.code == 2 and "outputs: expected one shape" in shown.err


@pytest.mark.parametrize(
    "words, message",
    [
        ("--config {}x", "--config: expected a UNetConfig"),
        ("--config '{\"features\": [0]}'", "features"),
        ("--config nowhere.json", "nowhere.json"),
        ("--case {}", "--case: expected a case as --fuzz prints it"),
        ("--fuzz 0", "--fuzz: expected a positive integer, got '0'"),
        ("--seed -1", "--seed"),
        ("--size 8", "--size: expected at least 16x16 for this network, got 8x8"),
        ("--json nowhere/report.json", "--json: cannot write nowhere/report.json (No such file or directory)"),
        ("--plot .", "--plot: cannot write . (Is a directory)"),
        ("--images nowhere", "--images: nowhere cannot be listed (No such file or directory)"),
        ("--images .", "no images in this folder"),
        ("--json out.png --plot out.png", "--plot: expected another file than --json, got out.png"),
        ("--plot error.jpg", "--plot: expected a file whose name ends in .png, got error.jpg"),
        ("--json /dev/null", "--json: expected a file to write a report to, got /dev/null"),
        (f"--case '{CASE}' --images plate", "--images: cannot be given with --case"),
        (f"--case '{CASE}' --no-gradients", "--no-gradients: cannot be given with --case"),
        ('--config \'{"downsample": "stride"}\' --size 40', "--size: height: expected a multiple of 16, got 40"),
        (f"--case '{NO_BATCH}'", "batch: expected at least 1, got 0"),
        ("--weights nowhere.pt", "nowhere.pt: no such file"),
        ("--all-configs", "--all-configs: the device is a CPU; TRITON_INTERPRET=1 runs the kernels"),
        ("--dtype tf32", "--dtype: tf32 is of tensor cores, expected fp32, fp16 or bf16 on a CPU"),
        ("--fuzz 3 --plot error.png", "--plot: shows a model's error, expected --weights, --images or another"),
    ],
)
def test_wrong_usage_is_one_line(run, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run("verify", *shlex.split(words))
    assert (shown.code, shown.out) == (2, "")
    assert len(shown.errors) == 1 and message in shown.err
    assert list(tmp_path.iterdir()) == []


def test_weights_are_not_overwritten(run, tmp_path):
    weights.save(FastUNet(features=(3, 4)), tmp_path / "mine.safetensors")
    before = (tmp_path / "mine.safetensors").read_bytes()
    shown = run("verify", *QUICK, "--json", tmp_path / "mine.safetensors")
    assert shown.code == 2 and "expected a file to write a report to" in shown.err
    assert (tmp_path / "mine.safetensors").read_bytes() == before


def test_what_was_not_compared_is_said(run, factory):
    assert "not compared: other streams and places in the batch (a CPU)" in run("verify", *QUICK).out
    shown = run("verify", *QUICK, "--factory", "mylab_models:own")
    assert "not compared: layers (the reference has no modules of their names)" in shown.out


def test_unusable_images(run, images):
    shown = run("verify", "--config", SMALL, "--images", images, "--size", "20")
    assert shown.code == 2 and "a.png has 20x17 pixels, expected at least 20x20" in shown.err
    (images / "a.png").write_bytes(b"no image")
    shown = run("verify", "--config", SMALL, "--images", images)
    assert shown.code == 2 and "a.png" in shown.err and len(shown.errors) == 1
    shown = run("verify", "--config", '{"in_channels": 2, "features": [3, 4]}', "--images", images)
    assert shown.code == 2 and "expected a model of 1 or 3 channels, got 2" in shown.err


@pytest.mark.parametrize("option, package", [("--plot", "matplotlib"), ("--fuzz", "hypothesis")])
def test_a_missing_package_is_named_with_its_cure(run, option, package, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == package else find(name, *a))
    shown = run("verify", *QUICK, option, "3")
    assert shown.code == 2 and f"{option}: needs {package} (pip install 'fastunet[verify]')" in shown.err


def test_fuzz(run, tmp_path):
    shown = run("verify", *QUICK, "--fuzz", "3", "--seed", "5", "--json", tmp_path / "report.json")
    assert shown.code == 0
    assert shown.out.endswith("\nrandom networks: 3 hold\nall holds\n")
    assert json.loads((tmp_path / "report.json").read_text())["fuzz"] == {"passed": 3, "failed": None, "finding": None}


def test_what_fuzz_finds_is_repeated_by_a_case(run, broken):
    shown = run("verify", *QUICK, "--fuzz", "3")
    assert shown.code == 1 and shown.out.endswith("\nNOT all holds\n")
    (again,) = [line for line in shown.out.splitlines() if line.startswith("again: fastunet verify --case")]
    repeated = run(*shlex.split(again.removeprefix("again: "))[1:])
    assert repeated.code == 1 and again in repeated.out
    assert repeated.out.strip() in shown.out


def test_interrupted_with_the_results_so_far(run, monkeypatch, tmp_path):
    def fuzz(count, seed, device, on_progress):
        on_progress(Fuzzed(41))
        raise KeyboardInterrupt

    monkeypatch.setattr("fastunet.cli.verify.fuzz", fuzz)
    shown = run("verify", *QUICK, "--fuzz", "100", "--json", tmp_path / "report.json")
    assert shown.code == 130
    assert "random networks: 41 hold\ninterrupted: these are the results so far\n" in shown.out
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["interrupted"] is True and found["ok"] is False and found["fuzz"]["passed"] == 41


def test_a_case_that_raises_is_found_by_its_command_too(run, monkeypatch):
    monkeypatch.setattr(forward, "reference", None)
    shown = run("verify", "--fuzz", "1")
    assert shown.code == 1 and "raised AttributeError" in shown.out
    (again,) = [line.removeprefix("again: ") for line in shown.out.splitlines() if line.startswith("again: ")]
    repeated = run(*shlex.split(again)[1:])
    assert repeated.code == 1 and "raised AttributeError" in repeated.out and again in repeated.out


def test_random_networks_alone(run):
    assert run("verify", "--fuzz", "2").out == "random networks: 2 hold\nall holds\n"


def test_interrupted_in_the_model_with_the_results_so_far(run, monkeypatch, tmp_path):
    def verify(*networks, on_result, **options):
        report = fastunet.verify(*networks, **options)
        on_result(report.comparisons[0])
        on_result(report.checks[0])
        raise KeyboardInterrupt

    monkeypatch.setattr("fastunet.cli.verify.verify", verify)
    shown = run("verify", *QUICK, "--json", tmp_path / "report.json")
    assert shown.code == 130
    assert "layer downs.0.conv.net.0 " in shown.out and "ok: as it is called, unwatched" in shown.out
    assert shown.out.endswith("interrupted: these are the results so far\nwhat was compared holds\n")
    found = json.loads((tmp_path / "report.json").read_text())
    assert [result["name"] for result in found["results"]] == ["downs.0.conv.net.0", "as it is called, unwatched"]
    assert found["report"] is None and found["ok"] is False


def test_what_ends_in_the_middle_loses_nothing(run, monkeypatch, tmp_path):
    def verify(*networks, on_result, **options):
        on_result(fastunet.verify(*networks, **options).comparisons[0])
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fastunet.cli.verify.verify", verify)
    shown = run("verify", *QUICK, "--json", tmp_path / "report.json")
    assert shown.code == 1 and "layer downs.0.conv.net.0 " in shown.out
    assert "ended early: the networks could not be run (RuntimeError: out of memory)" in shown.out
    found = json.loads((tmp_path / "report.json").read_text())
    assert len(found["results"]) == 1 and not found["ok"] and "out of memory" in found["failure"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted where they can run")
def test_the_interpreter_as_users_have_it():
    """It truncates to bfloat16 where these tests' own rounds."""
    command = [sys.executable, "-m", "fastunet", "verify", "--config", '{"features": [2, 3]}', "--size", "4x4"]
    shown = subprocess.run(
        [*command, "--batch", "1", "--dtype", "bf16", "--no-gradients"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "with the head in one pass" in shown.stdout  # as kernels alone have it


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted where they can run")
def test_every_launch_configuration(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    words = ("verify", "--config", '{"features": [64]}', "--size", "2x2", "--batch", "1", "--dtype", "fp16")
    shown = run(*words, "--all-configs", "--json", tmp_path / "report.json")
    assert shown.code == 0, shown.out
    configs = json.loads((tmp_path / "report.json").read_text())["configs"]
    for name in ("bottleneck.net.2", "bottleneck.net.2, gradient of the input"):
        texts = [c["implementation"] for c in configs if c["name"] == name]
        assert len(texts) == 2 and texts[0].endswith("TMA") and texts[1].endswith("pointers")
    gradients = {c["name"].rpartition("gradient of ")[2] for c in configs}
    assert {"the sums before its activation", "the bias", "the weight"} < gradients
    assert f"launch configurations: {len(configs)} of {len(configs)} hold" in shown.out

    right, right_gradient = kernels.conv_fwd, kernels.conv_wgrad

    def wrong(*tensors, config, **options):
        """Through TMA nothing is written; through pointers it cannot be launched."""
        if not config.tma:
            raise RuntimeError("out of resource: shared memory")
        y = right(*tensors, config=config, **options)
        return torch.empty_like(y)

    monkeypatch.setattr(kernels, "conv_fwd", wrong)

    def louder(*tensors, **options):
        weight, bias = right_gradient(*tensors, **options)
        return 1.1 * weight, bias

    monkeypatch.setattr(kernels, "conv_wgrad", louder)
    shown = run(*words, "--all-configs")
    assert shown.code == 1
    error = run("verify", "--config", '{"features": [1, 1]}', "--size", "1", "--all-configs").err
    assert error.endswith("expected at least 2x2 for this network, got 1x1\n")
    (again,) = [line.removeprefix("again: ") for line in shown.out.splitlines() if line.startswith("again: ")]
    assert again.startswith("TRITON_INTERPRET=1 fastunet verify --config ") and again.endswith(" --all-configs")
    broken = [line for line in shown.out.splitlines() if line.startswith("BROKEN: bottleneck.net.2 as ")]
    assert len(broken) == 2 and "TMA: NO parity" in broken[0] and "NaN or infinity" in broken[0]
    assert "pointers: NO parity" in broken[1] and "RuntimeError: out of resource" in broken[1]
    gradients = [line for line in shown.out.splitlines() if "gradient of the weight as " in line]
    assert len(gradients) == 3 and all("NO parity" in line for line in gradients)


def test_the_default_is_the_shipped_model(run):
    words = ("verify", "--size", "16", "--batch", "1")
    ours, named = run(*words).out, run(*words, "--weights", weights.NUCLEI).out
    assert ours.replace("the shipped nuclei model", str(weights.NUCLEI)) == named


def test_the_report_says_what_was_compared(run, images):
    shown = run("verify", "--config", SMALL, "--images", images, "--batch", "2").out.splitlines()
    assert shown[1:5] == [
        "FastUNet(features=(3, 4), align_corners=False) against UNet",
        "weights: random, seed 0",
        "reference: plain PyTorch",
        f"inputs: a.png, b.png; 2 of 3 in {images}, the middle 20x17 of each",
    ]
