"""A folder or a repository of the Hugging Face Hub, as huggingface_hub's mixin has it: weights, config, card."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import WeightsError
from .config import UNetConfig

if TYPE_CHECKING:
    from huggingface_hub import ModelHubMixin

_FILE = "model.safetensors"


@cache
def _mixin() -> type[ModelHubMixin]:
    """The class that does the work, made at first use: importing huggingface_hub takes half a second.

    Raises:
        ImportError: huggingface_hub is not installed; says how to.
    """
    try:
        from huggingface_hub import ModelHubMixin, hf_hub_download
    except ImportError:
        raise ImportError("the Hugging Face Hub needs huggingface_hub (pip install 'fastunet[hub]')") from None

    class Repository(
        ModelHubMixin,
        library_name="fastunet",
        pipeline_tag="image-segmentation",
        tags=["u-net", "image-segmentation"],
    ):
        """A model on its way to or from a folder."""

        def __init__(self, save: Callable[[Path], None] | None = None, found: Path | None = None) -> None:
            self.save, self.found = save, found

        def _save_pretrained(self, save_directory: Path) -> None:
            assert self.save is not None
            self.save(save_directory / _FILE)

        @classmethod
        def _from_pretrained(
            cls, *, model_id: str, cache_dir: Any, local_files_only: bool, **options: Any
        ) -> ModelHubMixin:
            if Path(model_id).is_dir():
                return cls(found=Path(model_id) / _FILE)
            wanted = {name: options[name] for name in ("revision", "force_download", "token")}
            path = hf_hub_download(model_id, _FILE, cache_dir=cache_dir, local_files_only=local_files_only, **wanted)
            return cls(found=Path(path))

    return Repository


def save(write: Callable[[Path], None], config: UNetConfig, folder: str | Path, **options: Any) -> Any:
    """``ModelHubMixin.save_pretrained`` of a model that ``write`` puts into a file."""
    return _mixin()(save=write).save_pretrained(folder, config=dataclasses.asdict(config), **options)  # pyright: ignore[reportCallIssue]


def push(write: Callable[[Path], None], config: UNetConfig, repository: str, **options: Any) -> str:
    """``ModelHubMixin.push_to_hub`` of a model that ``write`` puts into a file."""
    return _mixin()(save=write).push_to_hub(repository, config=dataclasses.asdict(config), **options)  # pyright: ignore[reportCallIssue]


def find(name: str | Path, **options: Any) -> Path:
    """The weights file in a folder, or of a repository, which is downloaded unless it is there already.

    Raises:
        WeightsError: (a ValueError) neither a folder that exists nor what could be a repository's name.
    """
    if not Path(name).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name)):
        raise WeightsError(f"{name}: expected a folder, or a repository's name such as owner/unet")
    path: Path = _mixin().from_pretrained(str(name), **options).found  # pyright: ignore[reportAttributeAccessIssue]
    return path
