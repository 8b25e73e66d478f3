"""Weights files: exact round trips, clear refusals, and nothing in them ever runs."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastunet
from fastunet import weights
from fastunet.config import UNetConfig
from fastunet.model import FastUNet
from fastunet.reference import UNet
from fastunet.weights import WeightsError

from .convert.networks import Tutorial

SMALL = UNetConfig(3, 2, (2, 4, 8), upsample="transpose", norm="batch", activation="leaky_relu")


@pytest.fixture
def model(seed: int) -> UNet:
    return UNet.from_config(SMALL).eval()


def one_line(error: pytest.ExceptionInfo[WeightsError], path: Path) -> str:
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_round_trip_is_exact(model: UNet, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weights.save(model.to(memory_format=torch.channels_last), path)  # type: ignore[call-overload]
    config, state = weights.read(path)
    assert config == SMALL
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_load_builds_the_network_and_computes_the_same(model: UNet, tmp_path: Path) -> None:
    weights.save(model, tmp_path / "a.safetensors")
    loaded = weights.load(tmp_path / "a.safetensors")
    assert isinstance(loaded, FastUNet)
    assert not loaded.training
    x = torch.randn(1, 3, 13, 22)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_load_decides_the_dtype_not_the_file(
    model: UNet, tmp_path: Path, dtype: torch.dtype | None, expected: torch.dtype
) -> None:
    weights.save(model.half(), tmp_path / "a.safetensors")
    assert next(weights.load(tmp_path / "a.safetensors", dtype=dtype).parameters()).dtype == expected


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_files_without_a_configuration_are_taken_for_the_nuclei_model(tmp_path: Path, suffix: str) -> None:
    state = UNet.from_config(weights.NUCLEI_CONFIG).state_dict()
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    loaded = weights.load(path)
    assert loaded.config == weights.NUCLEI_CONFIG
    assert all(torch.equal(state[key], value) for key, value in loaded.state_dict().items())


def test_the_tutorials_blocks_are_not_taken_for_the_nuclei_model(tmp_path: Path, seed: int) -> None:
    """Under the names that the nuclei model has as well, which has batch norm besides."""
    original = Tutorial()
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pth"):
        save_file(original.state_dict(), path) if path.suffix == ".safetensors" else torch.save(
            original.state_dict(), path
        )
        loaded = weights.load(path)
        assert loaded.config.features == (4, 8, 16) and loaded.config == fastunet.convert(path).config
        x = torch.randn(1, 1, 16, 24)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), original(x))


def test_a_failure_while_writing_leaves_the_old_file(
    model: UNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    weights.save(model, path)
    before = path.read_bytes()

    def half_written(temporary: Path, data: bytes) -> None:
        with temporary.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(KeyboardInterrupt):
        weights.save(model, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


# --- keys and shapes -------------------------------------------------------------------------


def drop(state: dict[str, torch.Tensor]) -> None:
    del state["bottleneck.net.0.weight"], state["head.bias"]


def reshape(state: dict[str, torch.Tensor]) -> None:
    state["downs.1.conv.net.0.weight"] = torch.zeros(4, 3, 3, 3)
    state["head.weight"] = torch.zeros(7)


def add(state: dict[str, torch.Tensor]) -> None:
    state["encoder.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop, "key 'bottleneck.net.0.weight' is missing"),
        (reshape, "key 'downs.1.conv.net.0.weight' has shape (4, 3, 3, 3), expected (4, 2, 3, 3)"),
        (add, "key 'encoder.weight' is not part of this network"),
    ],
)
def test_the_first_difference_is_named(
    model: UNet, change: Callable[[dict[str, torch.Tensor]], None], named: str
) -> None:
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(WeightsError) as error:
        weights.load_into(UNet.from_config(SMALL), state, "file")
    assert str(error.value) == f"file: {named}"


def test_a_refused_state_changes_nothing(model: UNet) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    del state["head.bias"]
    with pytest.raises(WeightsError):
        weights.load_into(model, state, "file")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# --- files that are no weights ---------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.99], ids=str)
def test_truncated_files(model: UNet, tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"a{suffix}"
    weights.save(model, path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(WeightsError) as error:
        weights.load(path)
    one_line(error, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_garbage(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(WeightsError) as error:
        weights.load(path)
    one_line(error, path)


@pytest.mark.parametrize("config", ["{", '{"depth": 4}', '{"features": "x"}', '{"negative_slope": "a"}', "[]"])
def test_a_bad_configuration_inside(tmp_path: Path, config: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1)}, path, metadata={"fastunet_config": config})
    with pytest.raises(WeightsError) as error:
        weights.load(path)
    one_line(error, path)


@pytest.mark.parametrize(
    ("claimed", "named"),
    [
        (
            {"features": (2, 4, 2**28)},
            "key 'bottleneck.net.0.weight' has shape (8, 4, 3, 3), expected (268435456, 4, 3",
        ),
        ({"features": (2, 4, 2**62)}, "not a usable configuration"),
        ({"encoder_convs": (10**12, 2, 2)}, "expected weights of 1000000000008 3x3 convolutions"),
        ({"features": (2,) * 10**5}, "expected weights of 399998 3x3 convolutions"),
    ],
    ids=["channels", "overflow", "convolutions", "levels"],
)
@pytest.mark.parametrize("load", [weights.load, fastunet.convert, FastUNet.from_pretrained])
def test_a_configuration_that_claims_more_than_the_file_holds(model, load, claimed, named, tmp_path, monkeypatch):
    """Nothing is allocated for it: networks are built on the meta device alone, and not of more layers than tensors."""
    path = tmp_path / "model.safetensors"
    config = {**dataclasses.asdict(SMALL), **claimed}
    save_file(model.state_dict(), path, metadata={"fastunet_config": json.dumps(config)})
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", only_on_meta)
    source = path
    if load == FastUNet.from_pretrained:
        pytest.importorskip("huggingface_hub")
        source = tmp_path
    with pytest.raises(WeightsError) as error:
        load(source)
    assert named in one_line(error, path)


def only_on_meta(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    assert tensor.is_meta
    return tensor


def test_what_cannot_be_saved(model: UNet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected a FastUNet or a reference.UNet, got Conv2d"):
        weights.save(torch.nn.Conv2d(1, 1, 1), tmp_path / "x.safetensors")  # pyright: ignore[reportArgumentType]
    with pytest.raises(FileNotFoundError) as raised:
        weights.save(model, tmp_path / "nowhere" / "x.safetensors")
    assert raised.value.filename == str(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(WeightsError) as error:
            weights.load(path)
        assert one_line(error, path).endswith("no such file")


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("how", ["plain pickle", "torch.save"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "it-ran"
    content = {"weight": Payload(trace)}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(content))
        pickle.loads(path.read_bytes())  # the payload works ...
    else:
        torch.save(content, path)
        torch.load(path, weights_only=False)
    assert trace.exists()
    trace.unlink()
    with pytest.raises(WeightsError) as error:
        weights.load(path)
    message = one_line(error, path)
    assert "refused" in message
    assert "weights_only" not in message  # torch's own text says how to run it anyway
    assert not trace.exists()  # ... and did not


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([torch.zeros(1)], "got list"),
        ({"state_dict": {"w": torch.zeros(1)}, "epoch": 3}, "nearest: none, the first key is 'w'"),
        ({"w": 1.0}, "'w' is float"),
    ],
    ids=["list", "nested", "number"],
)
def test_other_checkpoints_are_named(tmp_path: Path, content: object, named: str) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(WeightsError) as error:
        weights.load(path)
    assert named in one_line(error, path)
