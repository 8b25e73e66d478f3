"""The files of a run: whole at any moment, and enough to continue from. Reading them never runs code."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from .. import weights
from ..files import atomic_write
from ..reference import UNet
from . import curves
from .settings import Settings, TrainingError

if TYPE_CHECKING:
    from .loop import Point

STATE, LOCK = "last.pt", ".lock"
RESULTS = ("best.safetensors", "last.safetensors", "curve.csv", "curve.png")


@contextlib.contextmanager
def open_run(out: Path, identity: dict[str, Any], resume: bool, writes: bool) -> Iterator[dict[str, Any] | None]:
    """Make sure that ``out`` exists and can be written to; yield the state of the run in it, if there is one.

    Args:
        writes: whether this process does; no other may then, until the block ends or the process is killed.

    Raises:
        TrainingError: see :func:`fastunet.train.fit`.
    """
    if writes and not any(os.path.exists(out / name) for name in (LOCK, STATE)):  # False of what cannot be looked at
        _refuse_results(out)  # of no run, before the lock makes it look like one
    with contextlib.ExitStack() as stack:
        _take(out, stack if writes else None)
        yield _state(out, identity, resume)


def _take(out: Path, stack: contextlib.ExitStack | None) -> None:
    """Make ``out``, lock it until ``stack`` is closed, and see that it can be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if stack is not None:
            stack.enter_context(FileLock(out / LOCK, timeout=0))
            for left in out.glob(".????????????????.tmp"):  # of a process that was killed while it wrote
                left.unlink(missing_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # permission bits do not tell of a read-only disk
    except Timeout:
        raise TrainingError(f"{out}: another process is training there; take another folder") from None
    except OSError as error:
        raise TrainingError(f"{out}: cannot be written to ({error.strerror})") from None


def _refuse_results(out: Path) -> None:
    left = next((name for name in RESULTS if os.path.exists(out / name)), None)
    if left is not None:
        raise TrainingError(f"{out}: holds {left}, which would be overwritten; take another folder")


def _state(out: Path, identity: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """What :func:`write` left last, if it is of the run of ``identity``."""
    path = out / STATE
    if not path.exists():
        if not resume:  # of a kill at the first checkpoint there may be some
            _refuse_results(out)
        return None
    if not resume:
        raise TrainingError(f"{out}: holds a run; resume it (--resume) or take another folder")
    another = f"with its weights ({out / RESULTS[0]}) another can begin"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {key: state[key] for key in identity}
    except Exception as error:  # damaged archives raise many types
        foreign = isinstance(error, pickle.UnpicklingError)  # PyTorch's message advises to run what is in it
        reason = "no run wrote it" if foreign else str(error).partition("\n")[0] or repr(error)
        raise TrainingError(f"{path}: cannot be read ({reason}); {another}") from None
    # A run from before a setting was there ran by its default.
    settings = dataclasses.asdict(Settings()) | found["settings"]
    for name, value in identity["settings"].items():
        if settings[name] != value:
            has = f"the run in {out} has {settings[name]!r}, got {value!r}"
            raise TrainingError(f"{name}: {has}; {another}")
    theirs, ours = json.loads(found["config"]), json.loads(identity["config"])
    other = [name for name in ours if theirs.get(name) != ours[name]]
    if other:
        has, got = (", ".join(f"{name}={of.get(name)!r}" for name in other) for of in (theirs, ours))
        raise TrainingError(f"config: the run in {out} has {has}, got {got}")
    if found["data"] != identity["data"]:
        raise TrainingError(f"data: the run in {out} has other images or masks, or other channels or sizes of them")
    return state


def write(out: Path, model: UNet, state: dict[str, Any], points: Sequence[Point]) -> None:
    """Write all files of a run. A kill between two of them leaves a state from which all are written again.

    Raises:
        TrainingError: a file cannot be written, as on a full disk; what it held before is there still.
    """
    if points[-1].dice > max((point.dice for point in points[:-1]), default=-1.0):
        with _named(out / "best.safetensors") as path:
            weights.save(model, path)
    with _named(out / "last.safetensors") as path:
        weights.save(model, path)
    with _named(out / "curve.csv") as path:
        curves.write_csv(path, points)
    with _named(out / "curve.png") as path:
        curves.write_png(path, points)
    archive = io.BytesIO()
    torch.save(state, archive)  # not into the file, where it would turn a full disk into an error of the archive
    with _named(out / STATE) as path, atomic_write(path) as temporary:
        # Not getbuffer(), which CPython 3.12.1 crashes on where an error's traceback is the last to hold it.
        temporary.write_bytes(archive.getvalue())


@contextlib.contextmanager
def _named(path: Path) -> Iterator[Path]:
    """Yield ``path``; an OSError in the block becomes a TrainingError that names it, not a temporary file."""
    try:
        yield path
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written ({error.strerror or error})") from None
