"""What a run leaves when it is stopped, killed or cannot write, and how it goes on."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastunet import FastUNet, UNetConfig, train, weights
from fastunet.train import checkpoint

from .runs import CONFIG, FILES, QUICK, Stop, assert_same, files_of, names_of, new_model, stop_at


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_resume_is_bit_exact(data: train.Data, tmp_path: Path, dtype: str) -> None:
    settings = dataclasses.replace(QUICK, dtype=dtype)
    train.fit(new_model(), data, tmp_path / "whole", settings)
    with pytest.raises(Stop):  # in the interval after the second checkpoint
        train.fit(new_model(), data, tmp_path / "parts", settings, on_step=stop_at(5))
    assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["step"] == 4
    torch.manual_seed(99)  # another process has other random numbers, and another model to begin with
    train.fit(FastUNet.from_config(CONFIG), data, tmp_path / "parts", settings, resume=True, workers=1)
    assert_same(files_of(tmp_path / "parts"), files_of(tmp_path / "whole"))


@pytest.mark.parametrize("write", range(5))
def test_a_kill_between_any_two_files_of_a_checkpoint_costs_nothing(
    data: train.Data, tmp_path: Path, monkeypatch, write: int
) -> None:
    train.fit(new_model(), data, tmp_path / "whole", QUICK)
    replace, calls = os.replace, []

    def dies(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) > 5 + write:  # the first checkpoint writes all five, the second perhaps no best
            raise Stop
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(Stop):
        train.fit(new_model(), data, tmp_path / "parts", QUICK)
    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "parts" / ".0123456789abcdef.tmp").write_bytes(b"half a file")  # what a kill would leave
    for name in ("best.safetensors", "last.safetensors"):
        weights.load(tmp_path / "parts" / name)
    assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["step"] in (2, 4)
    train.fit(new_model(), data, tmp_path / "parts", QUICK, resume=True)
    assert_same(files_of(tmp_path / "parts"), files_of(tmp_path / "whole"))
    assert names_of(tmp_path / "parts") == FILES


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors", "curve.csv", "curve.png", "last.pt"])
def test_a_file_that_cannot_be_written_is_named_and_was_not_touched(
    data: train.Data, tmp_path: Path, monkeypatch, name: str
) -> None:
    train.fit(new_model(), data, tmp_path / "whole", QUICK)
    replace, calls = os.replace, []

    def full(source: Path, target: Path) -> None:
        calls.append(target.name)
        if calls.count(name) == (1 if name == "best.safetensors" else 2):  # the second may not be better
            no_space()
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    out = tmp_path / "out"
    with pytest.raises(train.TrainingError, match=f"^{out / name}: cannot be written \\(No space left on device\\)$"):
        train.fit(new_model(), data, out, QUICK)
    assert not list(out.glob(".*.tmp"))
    monkeypatch.setattr(os, "replace", replace)
    train.fit(new_model(), data, out, QUICK, resume=True)
    assert_same(files_of(out), files_of(tmp_path / "whole"))


def test_a_full_disk_is_said_to_be_one(data: train.Data, tmp_path: Path, monkeypatch) -> None:
    """However late: torch's archive has an error of its own for a write that fails within it."""
    resource = pytest.importorskip("resource")  # not on Windows
    small = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(checkpoint.weights, "save", lambda model, path: None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, small[1]))
    try:
        with pytest.raises(train.TrainingError, match=r"last.pt: cannot be written \(File too large\)$"):
            train.fit(new_model(), data, tmp_path, QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, small)
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".*.tmp"))


def test_a_folder_that_is_read_only_is_found_before_the_first_step(
    data: train.Data, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", no_space)  # the permissions of a folder do not stop root
    with pytest.raises(train.TrainingError, match=f"^{tmp_path}: cannot be written to"):
        train.fit(new_model(), data, tmp_path, QUICK, on_step=lambda *_: pytest.fail("began"))


def test_a_run_is_not_overwritten_nor_continued_as_another(folder: Path, data: train.Data, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        train.fit(new_model(), data, out, QUICK, on_step=stop_at(3))
    before = files_of(out)
    with pytest.raises(train.TrainingError, match=f"^{out}: holds a run; resume it"):
        train.fit(new_model(), data, out, QUICK)
    with pytest.raises(train.TrainingError, match=f"^lr: the run in {out} has 0.002, got 0.001; with its weights"):
        train.fit(new_model(), data, out, dataclasses.replace(QUICK, lr=1e-3), resume=True)
    with pytest.raises(
        train.TrainingError, match=r"^config: the run in .* has features=\[.*\], got features=\[4, 9\]$"
    ):
        train.fit(new_model(UNetConfig(features=(4, 9), norm="batch")), data, out, QUICK, resume=True)
    mask = folder / "train" / "labels" / "c.png"
    as_it_was, corrected = mask.read_bytes(), np.asarray(Image.open(mask)).copy()
    corrected[0, 0] = 0 if corrected[0, 0] else 1
    Image.fromarray(corrected).save(mask)
    with pytest.raises(train.TrainingError, match="^data: the run in .* has other images or masks"):
        train.fit(new_model(), train.find(folder, 1, 2), out, QUICK, resume=True)
    mask.write_bytes(as_it_was)
    assert train.find(folder, 1, 2).fingerprint() == data.fingerprint()
    (folder / "val" / "images" / "b.png").unlink()
    (folder / "val" / "labels" / "b.png").unlink()
    with pytest.raises(train.TrainingError, match="^data: the run in"):
        train.fit(new_model(), train.find(folder, 1, 2), out, QUICK, resume=True)
    with pytest.raises(train.TrainingError, match=f"^plain: the run in {out} has 0.0, got 0.5; with its weights"):
        train.fit(new_model(), data, out, dataclasses.replace(QUICK, plain=0.5), resume=True)
    assert_same(files_of(out), before)
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:-100])
    with pytest.raises(
        train.TrainingError,
        match=r"last.pt: cannot be read \(.*\); with its weights \(.*best.safetensors\) another can begin",
    ):
        train.fit(new_model(), data, out, QUICK, resume=True)


def test_an_image_of_the_same_name_size_and_exposure_is_another(folder: Path, data: train.Data) -> None:
    path = folder / "train" / "images" / "c.png"
    image = np.asarray(Image.open(path))
    Image.fromarray(np.ascontiguousarray(image[::-1])).save(path)
    assert train.find(folder, 1, 2).fingerprint() != data.fingerprint()


def test_a_process_that_does_not_write_removes_no_half_written_file(tmp_path: Path) -> None:
    """It holds no lock: the file may be that of another run, which is writing it."""
    left = tmp_path / ".0123456789abcdef.tmp"
    left.write_bytes(b"half a file")
    with checkpoint.open_run(tmp_path, {}, resume=False, writes=False):
        assert left.exists()
    with checkpoint.open_run(tmp_path, {}, resume=False, writes=True):
        assert not left.exists()


def test_processes_that_see_different_runs_do_not_go_on(data: train.Data, tmp_path: Path) -> None:
    class OneOfTwo(train.Processes):
        def gathered(self, value: int) -> list[int]:
            return [value, 0]  # the other machine's folder is empty

    with pytest.raises(Stop):
        train.fit(new_model(), data, tmp_path, QUICK, on_step=stop_at(3))
    process = OneOfTwo(torch.device("cpu"), count=2)
    with pytest.raises(train.TrainingError, match=r"one folder for all processes.* at steps \[2, 0\]"):
        train.fit(new_model(), data, tmp_path, QUICK, process=process, resume=True)


def test_a_run_from_before_a_setting_was_there_goes_on(data: train.Data, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train.fit(new_model(), data, tmp_path, QUICK, on_step=stop_at(3))
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["settings"]["plain"]
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(train.TrainingError, match=f"^plain: the run in {tmp_path} has 0.0, got 1.0"):
        train.fit(new_model(), data, tmp_path, dataclasses.replace(QUICK, plain=1.0), resume=True)
    assert train.fit(new_model(), data, tmp_path, QUICK, resume=True)[-1].step == QUICK.steps


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_is_trained_in_by_one_at_a_time(data: train.Data, tmp_path: Path, resume: bool) -> None:
    """And is free again however that one ends."""

    def intrude(step: int, loss: object) -> None:
        with pytest.raises(train.TrainingError, match=f"^{tmp_path / 'out'}: another process is training there"):
            train.fit(new_model(), data, tmp_path / "out", QUICK, resume=resume)
        raise Stop

    with pytest.raises(Stop):
        train.fit(new_model(), data, tmp_path / "out", QUICK, on_step=intrude)
    assert len(train.fit(new_model(), data, tmp_path / "out", QUICK)) == 3


@pytest.mark.parametrize("name", ["best.safetensors", "curve.png"])
def test_resume_overwrites_nothing_of_others(name: str, data: train.Data, tmp_path: Path) -> None:
    """Weights that were copied there, say: no run of which it would be a part ever began."""
    (tmp_path / name).write_bytes(b"somebody's")
    for resume in (True, True, False, True):
        with pytest.raises(train.TrainingError, match=f"holds {name}, which would be overwritten"):
            train.fit(new_model(), data, tmp_path, QUICK, resume=resume)
    assert (tmp_path / name).read_bytes() == b"somebody's"


def test_a_state_that_no_run_wrote_is_not_loaded_nor_advised_to_be(data: train.Data, tmp_path: Path) -> None:
    train.fit(new_model(), data, tmp_path, QUICK)
    torch.save({"step": print}, tmp_path / "last.pt")
    with pytest.raises(train.TrainingError, match=r"last.pt: cannot be read \(no run wrote it\); with its weights"):
        train.fit(new_model(), data, tmp_path, QUICK, resume=True)


def test_resume_where_nothing_is_begins(data: train.Data, tmp_path: Path) -> None:
    train.fit(new_model(), data, tmp_path / "a", QUICK, resume=True)
    train.fit(new_model(), data, tmp_path / "b", QUICK)
    assert_same(files_of(tmp_path / "a"), files_of(tmp_path / "b"))
