"""Files: the command line takes them, and the Hugging Face Hub's folders."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastunet
from fastunet import weights
from fastunet.checkpoint import WeightsError
from fastunet.convert import export

from .cases import CASES, image, make

ONE_OF_EACH = ["seed four levels", "milesial bilinear", "mateuszbuda", "jvanvugt valid norm transpose", "leejunhyun"]
ONE_OF_EACH += ["monai nontrainable"]


@pytest.fixture
def theirs(request, seed, tmp_path):
    """A file of a family, as its project writes it."""
    path = tmp_path / "theirs.pth"
    torch.save(make(request.param).state_dict(), path)
    return path


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("theirs", ["milesial", "nnunet oblong"], indirect=True)
def test_there_and_back(run, theirs, tmp_path):
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    done = run("convert", theirs, "--out", ours)
    assert done.code == 0, done.err
    first = done.out.splitlines()[0]
    assert first.startswith(f"{theirs}: ") and "recognised" not in done.err and "assumed" in first
    assert f"written: {ours}" in done.out and "weights of the file: bitwise equal" in done.out
    assert "parity: output off by" in done.out
    family = weights.load(ours).origin.family  # type: ignore[union-attr]
    done = run("convert", ours, "--to", family, "--out", back)
    assert done.code == 0, done.err
    assert same_bits(torch.load(back, weights_only=True), torch.load(theirs, weights_only=True))
    done = run("convert", theirs, "--to", family, "--out", tmp_path / "back.safetensors", "--no-verify")
    assert (done.code, "parity" in done.out) == (0, False)
    assert same_bits(load_file(tmp_path / "back.safetensors"), torch.load(theirs, weights_only=True))


def test_set_says_what_keys_do_not(run, seed, tmp_path):
    original = CASES["jvanvugt same norm transpose"].make().eval()
    torch.save(original.state_dict(), tmp_path / "theirs.pth")
    ours = tmp_path / "ours.safetensors"
    options = ("--set", "padding=same", "--set", "norm_momentum=2e-1")
    done = run("convert", tmp_path / "theirs.pth", "--out", ours, *options)
    assert done.code == 0, done.err
    assert "padding=" not in done.out.splitlines()[0] and "norm_eps=" in done.out.splitlines()[0]  # of what was assumed
    model = weights.load(ours)
    assert (model.config.padding, model.config.norm_momentum) == ("same", 0.2)
    x = image(original, (29, 38))
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x), rtol=1e-3, atol=1e-4)


def test_what_safetensors_cannot_hold_is_said(run, tmp_path):
    torch.save({**make("milesial").state_dict(), "mask_values": [0, 255]}, tmp_path / "a.pth")
    done = run("convert", tmp_path / "a.pth", "--to", "milesial", "--out", tmp_path / "b.safetensors", "--no-verify")
    assert done.code == 0 and "left out, as safetensors holds tensors alone (.pth does not): mask_values" in done.out
    done = run("convert", tmp_path / "a.pth", "--to", "milesial", "--out", tmp_path / "b.pth", "--no-verify")
    assert torch.load(tmp_path / "b.pth", weights_only=True)["mask_values"] == [0, 255]


def test_weights_that_are_not_finite_are_written_and_said(run, tmp_path):
    state = make("milesial").state_dict()
    state["outc.conv.bias"][0] = torch.nan
    torch.save(state, tmp_path / "a.pth")
    done = run("convert", tmp_path / "a.pth", "--out", tmp_path / "b.safetensors")
    assert done.code == 1 and "weights of the file: bitwise equal" in done.out
    assert "NOT checked: model: expected finite weights in torch.float32, 'head.bias' holds others" in done.out
    assert weights.load(tmp_path / "b.safetensors").state_dict()["head.bias"].isnan().any()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["a.pth", "--out", "b.pth"], "--out: expected a name that ends in .safetensors, got b.pth"),
        (["a.pth", "--out", "a.pth", "--to", "milesial"], "--out: expected another file than a.pth, which is read"),
        (
            ["a.pth", "--out", "none/b.safetensors"],
            "--out: cannot write none/b.safetensors (No such file or directory)",
        ),
        (["b.pth", "--out", "c.safetensors"], "b.pth: no such file"),
        (
            ["a.pth", "--out", "c.safetensors", "--to", "monai"],
            "--to: model: expected match='replicate_pad' of MONAI BasicUNet, got 'zero_pad'",
        ),
        (["a.pth", "--out", "c.safetensors", "--to", "unet"], "argument --to: invalid choice: 'unet'"),
        (["a.pth", "--out", "c.safetensors", "--set", "padding"], "argument --set: expected NAME=VALUE, got 'padding'"),
        (
            ["a.pth", "--out", "c.safetensors", "--set", "features=[1]"],
            "option 'features' is not for the caller to tell",
        ),
        (
            ["a.pth", "--out", "c.safetensors", "--set", "norm_eps=x"],
            "norm_eps: expected a number in [0, inf), got 'x'",
        ),
    ],
    ids=["suffix", "same", "folder", "missing", "other", "unknown", "no value", "not told", "no number"],
)
def test_wrong_usage_writes_nothing(run, arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(make("milesial").state_dict(), "a.pth")
    done = run("convert", *arguments)
    assert done.code == 2 and len(done.errors) == 1 and named in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_broken_parity_is_an_error(run, tmp_path, monkeypatch):
    """The last step does look: a network that computes something else does not pass."""
    torch.save(make("milesial").state_dict(), tmp_path / "a.pth")
    forward = fastunet.FastUNet.forward
    monkeypatch.setattr(fastunet.FastUNet, "forward", lambda self, x: forward(self, x) * 1.01)
    done = run("convert", tmp_path / "a.pth", "--out", tmp_path / "b.safetensors")
    assert done.code == 1 and "NO parity" in done.out


@pytest.mark.parametrize("theirs", ONE_OF_EACH, indirect=True)
def test_segment_takes_their_file(run, theirs, tmp_path):
    model = fastunet.convert(theirs)
    channels = model.config.in_channels
    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3)[: 2 + (channels == 3)], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cell.png")
    done = run("segment", tmp_path / "cell.png", "--out", tmp_path / "masks", "--weights", theirs)
    assert done.code == 0, done.err
    assert Image.open(tmp_path / "masks" / "cell_mask.png").size == (70, 45)


@pytest.mark.parametrize("theirs", ["milesial"], indirect=True)
def test_summary_and_verify_take_their_file(run, theirs, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with it, verify runs the kernels, slowly
    done = run("summary", "--weights", theirs, "--size", "64")
    assert done.code == 0 and "downs.0.conv.net.0" in done.out
    assert run("verify", "--weights", theirs, "--size", "32", "--no-gradients").code == 0


def test_a_damaged_file_is_one_line(run, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 64)
    done = run("segment", tmp_path, "--out", tmp_path / "masks", "--weights", tmp_path / "a.safetensors")
    assert done.code == 2 and len(done.errors) == 1 and "not a usable safetensors file" in done.err


# --- the Hugging Face Hub, offline -----------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_folder_and_back(offline, seed, tmp_path):
    original = make("nnunet")
    model = fastunet.convert(original)
    model.save_pretrained(tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert fastunet.UNetConfig(**config) == model.config
    again = fastunet.FastUNet.from_pretrained(tmp_path / "mine")
    assert type(again) is fastunet.FastUNet and not again.training and again.config == model.config
    assert same_bits(again.state_dict(), model.state_dict())
    assert same_bits(export(again, "nnunet"), dict(original.state_dict()))  # the way home is kept too
    x = image(original, CASES["nnunet"].size)
    with torch.no_grad():
        torch.testing.assert_close(again(x), original(x))


def test_a_folder_without_a_model(offline, tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        fastunet.FastUNet.from_pretrained(tmp_path)
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="expected a file that save_pretrained wrote"):
        fastunet.FastUNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["./mine", "models/of/mine", "/mine", "mine/model.safetensors/x"])
def test_a_folder_that_is_not_there(name, tmp_path, monkeypatch):
    """Nobody is asked for a repository of that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=f"^{name}: expected a folder, or a repository's name such as owner/unet$"):
        fastunet.FastUNet.from_pretrained(name)


def test_push_sends_the_folder(offline, monkeypatch, tmp_path):
    """To a stand-in for the Hub's API, as there is no network."""
    from huggingface_hub import hub_mixin

    sent = {}

    class Api:
        def __init__(self, token=None) -> None: ...

        def create_repo(self, repo_id, **options):
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **options):
            sent[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    model = fastunet.FastUNet(1, 2, (4, 8))
    assert model.push_to_hub("me/mine") == "https://hub/me/mine"
    (tmp_path / "model.safetensors").write_bytes(sent["me/mine"]["model.safetensors"])
    assert same_bits(fastunet.FastUNet.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_without_huggingface_hub_it_says_what_to_install(monkeypatch, tmp_path):
    from fastunet import hub

    hub._mixin.cache_clear()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'fastunet\[hub\]'"):
        fastunet.FastUNet.from_pretrained(tmp_path)
