"""Launching a kernel, and looking on at launches to make them again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes


@dataclass(frozen=True)
class Launch:
    """A launch that was made.

    Attributes:
        arguments: of all the kernel's parameters, in their order, constants included.
        again: launches the same code, which was compiled for arguments like these, on others in that order.
    """

    arguments: tuple[Any, ...]
    again: Callable[..., object]


_look: ContextVar[Callable[[Launch], None] | None] = ContextVar("fastunet_launches", default=None)


@contextlib.contextmanager
def seen(look: Callable[[Launch], None]) -> Iterator[None]:
    """Within the block ``look`` is called with each launch that was made."""
    token = _look.set(look)
    try:
        yield
    finally:
        _look.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``."""
    look = _look.get()
    if look is None:
        kernel[grid](*arguments, **options)
        return
    with _disable_current_modes():  # what Triton does with tensors is the launch's
        compiled = kernel[grid](*arguments, **options)
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    in_order = tuple(given.pop(name) for name in kernel.arg_names)
    if compiled is None:  # Triton's interpreter compiles nothing
        look(Launch(in_order, lambda *others: kernel[grid](*others, **given)))
    else:
        look(Launch(in_order, compiled[(*grid, 1, 1)[:3]]))
