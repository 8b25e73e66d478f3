"""Files that nobody should trust."""

from __future__ import annotations

import io
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastunet

from .cases import make, refusal


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "ran")


@pytest.mark.parametrize("place", ["beside", "in place of the weights", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused(place, tmp_path):
    state, trace = make("milesial").state_dict(), tmp_path / "trace"
    content = {**state, "mask_values": Payload(trace)} if place == "beside" else {"network_weights": Payload(trace)}
    data = io.BytesIO()
    pickle.dump(content, data) if place == "plain pickle" else torch.save(content, data)
    if place == "plain pickle":
        pickle.loads(data.getvalue())  # it does run ...
        trace.unlink()
    (tmp_path / "theirs.pth").write_bytes(data.getvalue())
    message = refusal(tmp_path / "theirs.pth")
    assert "refused" in message and "weights_only" not in message
    assert not trace.exists()  # ... and here does not


def test_damaged_safetensors_are_refused(tmp_path):
    path = tmp_path / "theirs.safetensors"
    save_file(make("milesial").state_dict(), path)
    whole = path.read_bytes()
    assert fastunet.convert(path).config.features == (4, 8, 16, 32, 64)
    for kept in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert "not a usable safetensors file" in refusal(path)


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1], ids=str)
def test_a_huge_header_is_refused(length, tmp_path):
    """Eight bytes claim a header larger than the file, or than memory."""
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    assert "not a usable safetensors file" in refusal(path)


def test_offsets_beyond_the_file_are_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert "not a usable safetensors file" in refusal(path)


def test_no_such_file(tmp_path):
    assert refusal(tmp_path / "none.pth") == f"{tmp_path / 'none.pth'}: no such file"
