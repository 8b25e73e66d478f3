"""Imports run one way. The arrows are read from the source with ast; nothing is imported for it.

    cli, benchmarks, tests -> train, predict, parity, weights -> convert, explain -> model -> ops
        -> {dispatch, reference, kernels} -> config

A room is a module or a subpackage of fastunet. A new one fails the test until it has a row here.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastunet

ROOT = Path(__file__).parent.parent
EXTERNAL_IN_KERNELS = {"torch", "triton"}

# What each room may import from the other rooms, directly.
ROOMS: dict[str, set[str]] = {
    # Leaves: nothing of ours.
    "config": set(),
    "files": set(),
    "kernels": set(),
    "measured": set(),
    "sources": set(),
    "images": {"files"},
    # Files, and where what is in them comes from.
    "origin": {"config"},
    "checkpoint": {"config", "files", "origin", "reference"},
    "hub": {"checkpoint", "config"},
    # The three that the operators choose among never see each other.
    "reference": {"config"},
    "dispatch": {"config", "measured"},
    "trace": {"config", "dispatch"},
    "ops": {"config", "dispatch", "measured", "reference", "kernels", "sources"},
    "graph": {"ops", "sources"},
    "plan": {"ops", "sources"},
    "built": {"reference"},
    "prepared": {"graph", "sources", "ops"},
    "small": {"config", "trace"},
    "model": {"config", "reference", "dispatch", "graph", "ops", "checkpoint", "hub"}
    | {"origin", "built", "plan", "prepared", "small", "sources"},
    # What is done with a model.
    "parity": {"built", "config", "dispatch", "kernels", "reference", "ops", "model", "trace"},
    "convert": {"config", "reference", "model", "checkpoint", "origin"},
    "weights": {"config", "reference", "model", "checkpoint", "convert"},
    "explain": {"built", "config", "dispatch", "ops", "model", "small", "trace"},
    "tune": {"config", "dispatch", "files", "graph", "measured", "model", "ops", "parity"},
    "predict": {"config", "images", "reference", "model"},
    "train": {"config", "files", "images", "reference", "model", "weights", "predict"},
}
# The doors: these may import every room above, and no room imports them.
DOORS = {"__init__", "__main__", "cli"}
DOOR_ARROWS = {"__init__": set(ROOMS), "cli": set(ROOMS), "__main__": {"cli"}}


def room_of(path: Path, root: Path) -> str:
    """``fastunet/ops.py`` -> ops, ``fastunet/convert/names.py`` -> convert, ``kernels/x.py`` -> kernels."""
    first, *rest = path.relative_to(root).parts
    return "kernels" if first == "kernels" else Path(rest[0]).stem


def modules(tree: ast.AST, package: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported, also inside functions and conditions.

    ``package`` resolves relative imports. ``from fastunet import ops`` gives ``fastunet.ops``.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            if module == "fastunet":
                found += [(node.lineno, f"fastunet.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
    return found


def sources(root: Path) -> list[Path]:
    """The package's files; the symlink fastunet/kernels is read as kernels/."""
    inside = [path for path in (root / "fastunet").rglob("*.py") if "kernels" not in path.relative_to(root).parts]
    return sorted(inside) + sorted((root / "kernels").rglob("*.py"))


def package_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parent.parts
    return ".".join(("fastunet", *parts) if parts[0] == "kernels" else parts)


def violations(root: Path) -> list[str]:
    """One line for each import that goes against the arrows."""
    wrong = []
    for path in sources(root):
        room = room_of(path, root)
        where = path.relative_to(root).as_posix()
        if room not in ROOMS and room not in DOORS:
            wrong.append(f"{where}: room {room!r} has no row in ROOMS")
            continue
        allowed = (DOOR_ARROWS[room] if room in DOORS else ROOMS[room]) | {room}
        for line, name in modules(ast.parse(path.read_text(encoding="utf-8")), package_of(path, root)):
            top, *rest = name.split(".")
            if top == "kernels":
                wrong.append(f"{where}:{line}: bare 'kernels'; write fastunet.kernels")
            elif top == "fastunet":
                target = rest[0] if rest else "__init__"
                if target not in allowed:
                    wrong.append(f"{where}:{line}: {room} imports {target}")
            elif room == "kernels" and top not in EXTERNAL_IN_KERNELS | sys.stdlib_module_names:
                wrong.append(f"{where}:{line}: kernels/ imports {top}")
    return wrong


def absolute_imports_in_kernels(root: Path) -> list[str]:
    """Kernels import each other relatively, so that they read the same under either path."""
    wrong = []
    for path in sorted((root / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            wrong += [f"{path.name}: {name}" for name in names if name.split(".")[0] == "fastunet"]
    return wrong


def test_arrows():
    assert violations(ROOT) == []


def test_kernels_import_each_other_relatively():
    assert absolute_imports_in_kernels(ROOT) == []


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "tests"])
def test_nobody_imports_bare_kernels(folder):
    for path in (ROOT / folder).rglob("*.py"):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        tops = {name.split(".")[0] for _, name in modules(ast.parse(path.read_text(encoding="utf-8")), package)}
        assert "kernels" not in tops, path


def test_no_room_may_import_a_later_one():
    """The table itself has no circle: following its rows from any room never comes back to it."""
    for start in ROOMS:
        reached, frontier = set(), ROOMS[start]
        while frontier:
            reached |= frontier
            frontier = set().union(*(ROOMS[room] for room in frontier)) - reached
        assert start not in reached


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("fastunet/reference.py", "from . import ops", "reference imports ops"),
        ("fastunet/reference.py", "from .kernels.conv3x3 import conv_fwd", "reference imports kernels"),
        (
            "fastunet/dispatch.py",
            "def f():\n    from fastunet import reference",
            "dispatch imports reference",
        ),
        ("fastunet/model.py", "import fastunet.cli", "model imports cli"),
        ("fastunet/trace.py", "from .reference import UNet", "trace imports reference"),
        ("fastunet/ops.py", "from kernels import conv_fwd", "bare 'kernels'"),
        ("fastunet/ops.py", "import fastunet", "ops imports __init__"),
        ("fastunet/convert/names.py", "from ..cli import main", "convert imports cli"),
        ("fastunet/novel.py", "", "room 'novel' has no row"),
        ("kernels/conv3x3.py", "import numpy", "kernels/ imports numpy"),
        ("kernels/conv3x3.py", "from ..ops import conv2d_relu", "kernels imports ops"),
        ("kernels/hopper/conv3x3.py", "from ...dispatch import choose", "kernels imports dispatch"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, source, complaint):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = violations(tmp_path)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("fastunet/ops.py", "import torch\nfrom . import dispatch, kernels\nfrom .reference import UNet"),
        ("kernels/conv3x3.py", "import math\nimport triton.language as tl\nfrom .tuning import ConvConfig"),
        ("kernels/hopper/conv3x3.py", "from ..tuning import ConvConfig\nfrom . import barrier"),
    ],
)
def test_what_is_allowed_passes(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path) == []


SIDE_EFFECTS = """
import os, sys, threading, warnings
import torch
if {without_triton}:
    sys.modules["triton"] = None  # as where it is not installed: importing it raises ImportError
warnings.simplefilter("error")

def state():
    return (
        dict(os.environ), threading.active_count(), torch.get_num_threads(), torch.get_default_dtype(),
        torch.is_grad_enabled(), torch.cuda.is_initialized(), torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), torch.initial_seed(),
    )

before = state()
import fastunet
assert state() == before
for heavy in ("matplotlib", "rich", "PIL", "tifffile", "huggingface_hub"):
    assert heavy not in sys.modules, heavy
"""


@pytest.mark.parametrize("without_triton", [False, True], ids=["triton", "no-triton"])
def test_importing_fastunet_changes_nothing(without_triton):
    """No CUDA context, no thread, no setting, no output; and it works where Triton is missing."""
    command = [sys.executable, "-c", SIDE_EFFECTS.format(without_triton=without_triton)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["images", "predict", "train", "weights"])
def test_modules_of_the_documentation_are_there(name):
    """Imported by nobody else yet: asked for as Python does where a module has no such attribute."""
    assert fastunet.__getattr__(name).__name__ == f"fastunet.{name}"


def test_what_is_not_there_is_said():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fastunet.nothing  # noqa: B018
