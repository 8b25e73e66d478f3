"""``fastunet train``: what it writes, what it says, killed, resumed, and in two processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastunet
from fastunet import UNetConfig, train, weights
from fastunet.train import processes

from ..blobs import write_pairs, write_split
from ..train.runs import FILES, assert_same, files_of, names_of

CONFIG = json.dumps({"features": [4, 8]})
QUICK = ("--config", CONFIG, "--steps", 4, "--batch", 2, "--size", 16, "--every", 2)
STRIDED = json.dumps({"features": [4, 8], "downsample": "stride"})
UNPADDED = json.dumps({"features": [4, 8], "match": "center_crop", "padding": "valid"})
TRAIN = "-m", "fastunet", "train"
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
POINT = (
    r"step \d+: loss [\d.]+, validation loss [\d.]+, Dice [\d.]+ \(all pixels\), [\d.]+ \(mean of images\), .* images/s"
)


@pytest.fixture
def folder(rng: np.random.Generator, tmp_path: Path) -> Path:
    return write_split(tmp_path / "data", rng)


def start(*arguments: object, program: Sequence[str] = TRAIN) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(fastunet.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_writes_five_files_that_the_other_commands_take(run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    done = run("train", folder, "--out", out, *QUICK)
    assert (done.code, done.err) == (0, "")
    first, *points, last = done.out.splitlines()
    assert first == "4 images to train on, 2 to validate"
    assert [bool(re.fullmatch(POINT, line)) for line in points] == [True, True]
    nothing = "; it finds nothing yet, and wants more steps"
    end = rf"best Dice ([\d.]+), at step [24]: {out}/best.safetensors({nothing})?"
    found = re.fullmatch(end, last)
    assert found and (float(found[1]) < 5e-5) == bool(found[2])
    assert names_of(out) == FILES
    Image.open(out / "curve.png").verify()
    assert weights.load(out / "best.safetensors").config == UNetConfig.from_json(CONFIG)
    assert isinstance(torch.load(out / "last.pt", weights_only=True), dict)
    image = folder / "val" / "images" / "a.png"
    assert run("segment", image, "--out", tmp_path / "m", "--weights", out / "best.safetensors").code == 0


def test_the_bar_shows_loss_dice_and_throughput(run, folder: Path, tmp_path: Path, monkeypatch) -> None:
    shown: list[tuple[int, str]] = []

    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def add_task(self, description: str, total: int) -> int:
            assert total == 27
            return 0

        def update(self, task: int, completed: int, description: str) -> None:
            shown.append((completed, description))

    monkeypatch.setattr("fastunet.cli.train.new_progress", lambda console: Bar())
    options = ("--config", CONFIG, "--batch", 1, "--size", 16, "--steps", 27, "--every", 15)
    assert run("train", folder, "--out", tmp_path / "out", *options).code == 0
    assert [step for step, _ in shown] == [10, 15, 20, 27]  # at the end it is full
    assert re.fullmatch(r"loss \d\.\d{3}  \d+\.\d images/s", shown[0][1])
    dice = files_of(tmp_path / "out")["state"]["points"][0]["dice"]
    assert re.fullmatch(rf"loss \d\.\d{{3}}  Dice {dice:.3f}  \d+\.\d images/s", shown[2][1])


def test_how_long_it_takes_is_said_once(run, folder: Path, tmp_path: Path, monkeypatch) -> None:
    def fit(*_: object, on_step: Callable[[int, torch.Tensor], None], **options: object) -> list[train.Point]:
        for step in range(1, 31):
            on_step(step, torch.tensor(1.0))
        return [train.Point(30, *[0.0] * 6)]

    monkeypatch.setattr("fastunet.cli.train.fit", fit)
    clock = iter(range(0, 1000, 9))  # a second for each of the first nine steps
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    options = ("--steps", 3610, "--batch", 2, "--config", CONFIG, "--size", 16)
    done = run("train", folder, "--out", tmp_path / "out", *options)
    _, estimate, end = done.out.splitlines()
    assert estimate == "2.0 images/s: some 60 minutes to go, validation aside"
    assert end.endswith("best.safetensors; it finds nothing yet, and wants more steps")


def test_plain_pairs_and_weights_to_begin_with(run, rng, tmp_path: Path) -> None:
    write_pairs(tmp_path / "plain", rng, 4, masks="masks")
    torch.manual_seed(3)
    model = fastunet.FastUNet(1, 1, (4, 8), norm="batch")
    weights.save(model, tmp_path / "w.safetensors")
    options = ("--weights", tmp_path / "w.safetensors", "--steps", 1, "--size", 16, "--lr", 1e-30, "--weight-decay", 0)
    done = run("train", tmp_path / "plain", "--out", tmp_path / "out", *options, "--ema", 0, "--val-fraction", 0.5)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("2 images to train on, 2 to validate\n")
    tuned = weights.load(tmp_path / "out" / "last.safetensors")
    assert tuned.config == model.config
    for p, q in zip(tuned.parameters(), model.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-29  # of so low a rate nothing shows, so it did begin there


def test_bad_files_are_all_named_before_anything_starts(run, folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "images" / "a.png").write_bytes(b"")
    (folder / "train" / "labels" / "b.png").unlink()
    (folder / "val" / "images" / "a.png").unlink()
    done = run("train", folder, "--out", tmp_path / "out", *QUICK)
    assert (done.code, done.out) == (2, "")
    assert len(done.errors) == 3
    for line, name in zip(done.errors, ("train/images/b.png", "train/images/a.png", "val/labels/a.png"), strict=True):
        assert line.startswith(f"fastunet: {folder / name}: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lr", "0"), "--lr: expected a positive number, got 0.0"),
        (("--warmup", "1"), "--warmup: expected a number in [0, 1), got 1.0"),
        (("--weight-decay", "-1"), "--weight-decay: expected a number of at least 0, got -1.0"),
        (("--size", "15"), "--size: expected at least 16 for this network, got 15"),
        (("--config", STRIDED, "--size", "15"), "--size: expected a multiple of 2 for this network, got 15"),
        (
            ("--config", UNPADDED),
            "--config: expected padding='same', whose output covers the whole window, got 'valid'",
        ),
        (("--val-fraction", "1"), "--val-fraction: expected a number in (0, 1), got 1.0"),
        (("--workers", "-1"), "--workers: expected a number of at least 0, got -1"),
        (("--config", '{"in_channels": 2}'), "--config: expected 1 or 3 input channels, as images have, got 2"),
        (("--weights", "no.pt"), "no.pt: no such file"),
    ],
)
def test_wrong_options(run, folder: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    base = () if options[0] in ("--config", "--weights") else ("--config", '{"features": [2, 2, 2, 2, 2]}')
    done = run("train", folder, "--out", tmp_path / "out", *base, *options)
    assert (done.code, done.err) == (2, f"fastunet: {message}\n")
    assert not (tmp_path / "out").exists()


def test_an_earlier_run_is_neither_overwritten_nor_mixed_up(run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("train", folder, "--out", out, *QUICK).code == 0
    done = run("train", folder, "--out", out, *QUICK)
    assert (done.code, done.err) == (
        2,
        f"fastunet: {out}: holds a run; resume it (--resume) or take another folder\n",
    )
    done = run("train", folder, "--out", out, *QUICK, "--lr", 1, "--resume")
    hint = f"with its weights ({out / 'best.safetensors'}) another can begin"
    assert (done.code, done.err) == (2, f"fastunet: --lr: the run in {out} has 0.002, got 1.0; {hint}\n")
    done = run("train", folder, "--out", out, *QUICK, "--resume")  # which is done
    assert (done.code, done.err) == (0, "")
    _, resumed, _ = done.out.splitlines()
    assert re.fullmatch(rf"{re.escape(str(out))}: (\d+) of \1 steps are done", resumed)
    (out / "last.pt").unlink()
    weights = (out / "best.safetensors").read_bytes()
    done = run("train", folder, "--out", out, *QUICK)
    told = f"fastunet: {out}: holds best.safetensors, which would be overwritten; take another folder\n"
    assert (done.code, done.err) == (2, told)
    assert (out / "best.safetensors").read_bytes() == weights
    done = run("train", folder, "--out", tmp_path / "new", *QUICK, "--resume")
    assert done.code == 0 and f"{tmp_path / 'new'}: holds no run, one begins" in done.out.splitlines()


def test_an_interrupted_run_says_how_it_goes_on(run, folder: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupted(model: Any, data: Any, out: Path, *_: Any, **__: Any) -> None:
        out.mkdir()
        (out / "last.pt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("fastunet.cli.train.fit", interrupted)
    out = tmp_path / "out"
    done = run("train", folder, "--out", out, *QUICK)
    assert (done.code, done.err) == (130, "fastunet: interrupted\n")
    assert done.out.splitlines()[-1] == f"{out}: --resume goes on from its last checkpoint"


def test_divergence_is_exit_code_1(run, folder: Path, tmp_path: Path) -> None:
    done = run("train", folder, "--out", tmp_path / "out", *QUICK, "--lr", 1e30)
    assert done.code == 1
    assert re.fullmatch(r"fastunet: loss or weights are NaN or infinite after \d steps; try a lower lr\n", done.err)


def test_a_file_that_is_lost_while_it_trains_is_named(run, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fastunet.train.data.MEMORY", 0)  # too many images to keep
    found = train.find

    def then_lost(*arguments: Any) -> train.Data:
        data = found(*arguments)
        for pair in data.train:
            pair.image_path.unlink()
        return data

    monkeypatch.setattr("fastunet.cli.train.find", then_lost)
    for workers in (0, 1):
        done = run("train", folder, "--out", tmp_path / str(workers), "--workers", workers, *QUICK)
        assert done.code == 2
        assert re.fullmatch(r"fastunet: .*/train/images/[a-d]\.png: no such file\n", done.err)
        for path in (folder / "train" / "labels").iterdir():
            Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(folder / "train" / "images" / path.name)


def test_more_processes_than_gpus(run, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("fastunet.cli.train.processes", lambda device: processes("cuda"))
    done = run("train", folder, "--out", tmp_path / "out", *QUICK)
    assert done.code == 2
    assert done.err == "fastunet: --device: expected a GPU for each of torchrun's processes here, got 1\n"


def test_a_missing_package_is_named(run, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchmetrics" else name)
    done = run("train", folder, "--out", tmp_path / "out")
    assert (done.code, done.err) == (2, "fastunet: train: needs torchmetrics (pip install 'fastunet[train]')\n")


@pytest.mark.slow
def test_sigkill_at_any_moment_breaks_no_file_and_loses_no_checkpoint(folder: Path, tmp_path: Path, rng) -> None:
    """Killed at random while it does little else than write checkpoints; then it goes on to the end."""
    options = (folder, "--config", CONFIG, "--batch", 1, "--size", 16, "--steps", 10, "--every", 1)
    whole, out = tmp_path / "whole", tmp_path / "out"
    child = start(*options, "--out", out)
    deadline = time.monotonic() + 300
    while not ((out / "curve.csv").exists() and len((out / "curve.csv").read_text().splitlines()) > 2):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.5))
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    state = torch.load(out / "last.pt", weights_only=True)
    rows = len((out / "curve.csv").read_text().splitlines()) - 1
    assert state["step"] > 0
    assert rows - state["step"] in (0, 1)  # the state is written last
    for name in ("best.safetensors", "last.safetensors"):
        weights.load(out / name)
    Image.open(out / "curve.png").verify()
    uninterrupted, last = start(*options, "--out", whole), start(*options, "--out", out, "--resume")
    for child in (uninterrupted, last):
        _, err = child.communicate(timeout=600)
        assert (child.returncode, err) == (0, "")
    assert_same(files_of(out), files_of(whole))
    assert names_of(out) == FILES


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(run, folder: Path, tmp_path: Path) -> None:
    """Without a norm, whose statistics are each process's own: sums in another order are all that differs.

    And if one of the two is killed, they go on to the same bits.
    """
    options = (folder, *QUICK, "--batch", 4, "--lr", 1e-4)
    (tmp_path / "dies.py").write_text(DIES)
    child = start(*options, "--out", tmp_path / "two", program=(*TORCHRUN, *TRAIN))
    killed = start(*options, "--out", tmp_path / "killed", program=(*TORCHRUN, str(tmp_path / "dies.py")))
    out, err = child.communicate(timeout=600)
    assert child.returncode == 0, err
    killed.communicate(timeout=600)
    assert killed.returncode != 0
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] == 2
    resumed = start(*options, "--out", tmp_path / "killed", "--resume", program=(*TORCHRUN, *TRAIN))
    _, err = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, err
    assert_same(files_of(tmp_path / "killed"), files_of(tmp_path / "two"))
    assert names_of(tmp_path / "killed") == FILES
    assert run("train", *options, "--out", tmp_path / "one").code == 0
    assert out.count("images to train on") == 1
    assert out.count("best Dice") == 1
    assert names_of(tmp_path / "two") == FILES
    one, two = (files_of(tmp_path / name)["state"] for name in ("one", "two"))
    for a, b in zip(one["points"], two["points"], strict=True):
        assert b == pytest.approx(a, rel=1e-3)
    # Adam's first moment is linear in the gradients, so it compares them.
    start_of = [p.detach() for p in _initial().parameters()]
    for key, moments in one["optimiser"]["state"].items():
        ours, theirs = two["optimiser"]["state"][key]["exp_avg"], moments["exp_avg"]
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    for p, a, b in zip(start_of, one["model"].values(), two["model"].values(), strict=True):
        assert (a - b).norm() < 0.02 * (a - p).norm()
        assert not torch.equal(a, p)


# One of two processes ends so behind the step after the first checkpoint.
DIES = """
import os, signal, sys
import fastunet.cli.train as command
from fastunet.cli import main
fit = command.fit
def dies(*arguments, on_step, **options):
    def step(done, loss):
        if done == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        on_step(done, loss)
    return fit(*arguments, on_step=step, **options)
command.fit = dies
sys.exit(main(["train", *sys.argv[1:]]))
"""


def _initial() -> fastunet.FastUNet:
    torch.manual_seed(0)  # the default of --seed
    return fastunet.FastUNet.from_config(UNetConfig.from_json(CONFIG))


@pytest.mark.slow
def test_two_processes_say_bad_data_once(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "labels" / "b.png").unlink()
    child = start(folder, *QUICK, "--out", tmp_path / "two", program=(*TORCHRUN, *TRAIN))
    _, err = child.communicate(timeout=600)
    assert child.returncode != 0
    assert err.count("fastunet: ") == 1
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
def test_what_only_one_of_two_processes_lacks_is_said(folder: Path, tmp_path: Path, seed: int) -> None:
    """As on two machines, of which one has no data; either."""
    rank = seed % 2
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\n"
        "from fastunet.cli import main\n"
        f"data = 'nowhere' if os.environ['RANK'] == '{rank}' else sys.argv[1]\n"
        "sys.exit(main(['train', data, *sys.argv[2:]]))\n"
    )
    child = start(folder, *QUICK, "--out", tmp_path / "two", program=(*TORCHRUN, str(script)))
    _, err = child.communicate(timeout=600)
    assert child.returncode != 0
    assert err.count("fastunet: nowhere: no such folder") == 1
