"""The page "Bring your own U-Net": its snippets run, each beside the network that it is about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastunet

from .cases import image, make
from .networks import Jvanvugt

PAGE = Path(__file__).parents[2] / "docs" / "convert.md"
SNIPPETS = re.findall(r"<!-- network: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
NETWORKS = {
    "seed": lambda: make("seed two levels"),
    "jvanvugt": lambda: Jvanvugt(padding=True, batch_norm=True).eval(),
    "mateuszbuda": lambda: make("mateuszbuda"),
    "milesial": lambda: make("milesial"),
    "leejunhyun": lambda: make("leejunhyun"),
    "nnunet": lambda: make("nnunet"),
}


def test_every_family_has_one():
    assert set(fastunet.convert.FAMILIES) - {"monai"} == {name for name, _ in SNIPPETS} - {"none"}
    assert any("BasicUNet" in code for _, code in SNIPPETS)


@pytest.mark.parametrize(("name", "code"), SNIPPETS, ids=lambda value: value.split()[0])
def test_snippet(name, code, seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "pretrained" in code:
        pytest.importorskip("huggingface_hub")
    network = None if name == "none" else NETWORKS[name]()
    names = {"fastunet": fastunet, "torch": torch, "network": network}
    exec(code, names)
    network, model = names["network"], names["model"]
    x = image(network, (32, 48))
    network.eval()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), network(x), rtol=1e-3, atol=1e-4)
