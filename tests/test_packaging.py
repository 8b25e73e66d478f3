"""What is built is what is meant: kernels under fastunet.kernels, weights, types, nothing at the top."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow

CHECKOUT = (
    "benchmarks", "docs", "examples", "fastunet", "kernels", "tests",
    "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md",
    "constraints.txt", "pyproject.toml", "setup.py",
)  # fmt: skip


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """``sdist`` and ``wheel`` of a copy of the checkout, the wheel built from the sdist."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in CHECKOUT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, copy / name)
    # With neither --sdist nor --wheel, build makes the sdist, unpacks it and makes the wheel of that.
    run("-m", "build", "--no-isolation", "--outdir", copy / "dist", cwd=copy)
    (sdist,), (wheel,) = (copy / "dist").glob("*.tar.gz"), (copy / "dist").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.fixture(scope="module")
def wheel_files(built) -> set[str]:
    with zipfile.ZipFile(built["wheel"]) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


def expected_files() -> set[str]:
    """Every Python file of the checkout's two source folders, at its installed place."""
    package = [path for path in (ROOT / "fastunet").rglob("*.py") if not path.is_relative_to(ROOT / "fastunet/kernels")]
    kernels = (ROOT / "kernels").rglob("*.py")
    return {path.relative_to(ROOT).as_posix() for path in package} | {
        f"fastunet/{path.relative_to(ROOT).as_posix()}" for path in kernels
    }


def test_wheel_has_every_module(wheel_files):
    """Also a new subpackage that setup.py does not list yet."""
    assert {name for name in wheel_files if name.endswith(".py")} == expected_files()


def test_wheel_has_weights_and_type_marker(wheel_files):
    assert {
        "fastunet/py.typed",
        "fastunet/pretrained/nuclei.safetensors",
        "fastunet/pretrained/nuclei.md",
    } <= wheel_files


def test_wheel_installs_one_top_level_package(wheel_files):
    assert {name.split("/")[0] for name in wheel_files} == {"fastunet"}


def test_sdist_has_what_is_needed_to_build_and_test(built):
    with tarfile.open(built["sdist"]) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    assert set(CHECKOUT) - {"benchmarks", "docs", "examples", "fastunet", "kernels", "tests"} <= names
    assert {
        "kernels/conv3x3.py",
        "tests/test_packaging.py",
        "examples/demo.py",
        "examples/nuclei.png",
    } <= names
    assert not any(name.startswith("fastunet/kernels/") for name in names)


def test_installed_wheel_runs_from_its_own_files(built, tmp_path):
    target = tmp_path / "site"
    run(
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        target,
        built["wheel"],
        cwd=tmp_path,
    )
    script = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import fastunet, fastunet.kernels, fastunet.weights, importlib.metadata\n"
        "print(fastunet.__file__)\n"
        "print(fastunet.kernels.__file__)\n"
        "print(fastunet.weights.NUCLEI)\n"
        "print(fastunet.__version__, importlib.metadata.version('fastunet'))\n"
    )
    *paths, version = run("-I", "-c", script, cwd=tmp_path).splitlines()
    assert [Path(path).relative_to(target).as_posix() for path in paths] == [
        "fastunet/__init__.py",
        "fastunet/kernels/__init__.py",
        "fastunet/pretrained/nuclei.safetensors",
    ]
    assert version == "0.1.0 0.1.0"
    assert (target / "bin" / "fastunet").is_file()
