"""Packaging. The version lives here and nowhere else; tool settings are in pyproject.toml.

``kernels/`` stands beside ``fastunet/`` in the checkout and is installed as ``fastunet.kernels``:
a top-level package named ``kernels`` would collide with the public one of that name. The symlink
``fastunet/kernels`` gives an uninstalled checkout the same import path.
"""

from pathlib import Path

from setuptools import setup

# PyTorch's CPU builds do not bring Triton, and Triton's wheels exist for these two platforms.
TRITON = "triton>=3.6; sys_platform == 'linux' and (platform_machine == 'x86_64' or platform_machine == 'aarch64')"

TRAIN = ["filelock", "matplotlib", "torchmetrics>=1.9"]
VERIFY = ["hypothesis", "matplotlib"]
HUB = ["huggingface_hub"]
# The tests convert networks of dynamic-network-architectures too, which is installed without its dependencies
# (torchvision and timm, which nothing here imports): see the Makefile.
TEST = ["build", "hypothesis", "pytest", "pytest-benchmark", "pytest-xdist", "setuptools>=77", "monai", *HUB]
DEV = [*TRAIN, "pyright", "ruff"]

setup(
    name="fastunet",
    version="0.1.0",
    description="A drop-in U-Net for PyTorch with fused Triton kernels, checked against float64",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The FastUNet authors",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["u-net", "segmentation", "pytorch", "triton", "gpu"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    install_requires=["torch>=2.11", TRITON, "numpy", "pillow", "rich", "safetensors", "tifffile"],
    extras_require={"train": TRAIN, "verify": VERIFY, "hub": HUB, "test": TEST, "dev": TEST + DEV},
    packages=[
        "fastunet",
        "fastunet.cli",
        "fastunet.convert",
        "fastunet.kernels",
        "fastunet.kernels.hopper",
        "fastunet.ops",
        "fastunet.parity",
        "fastunet.train",
    ],
    package_dir={"fastunet": "fastunet", "fastunet.kernels": "kernels"},
    package_data={"fastunet": ["py.typed", "pretrained/*", "tables/*.json"]},
    entry_points={"console_scripts": ["fastunet=fastunet.cli:main"]},
    zip_safe=False,
)
