"""Triton's interpreter, made to do what it does once: half the time of small kernels is not theirs.

It is told by its private names; what it computes stays as it is.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


def without_search_for_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for one in every sum of indices, for a third of its time."""
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


def patching_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It patches ``triton.language`` in each call of a device function, though the launch has it patched already."""
    patch: Callable[[Any], Any] = interpreter._patch_lang
    done: set[frozenset[Any]] = set()  # of the launch under way: which of its modules

    def once(fn: Any) -> Any:
        modules = frozenset(m for m in fn.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core))
        if modules in done:
            return interpreter._LangPatchScope()
        scope, first = patch(fn), not done
        done.add(modules)
        if first:
            restore = scope.restore

            def restore_and_forget() -> None:
                done.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", once)
