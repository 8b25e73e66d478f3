"""Plans of a whole forward pass, for as long as the weights that they were made of stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .ops.plan import Plan
from .ops.planned import Instead, kind, planned
from .sources import Kept

KEPT = 64  # plans of a model: some hundred kB each, of arguments


class Plans:
    """Plans of one model by the kind of input; made when a kind comes for the second time."""

    def __init__(self) -> None:
        self._kept: Kept[Plan | Instead] = Kept(KEPT)

    def clear(self) -> None:
        """Forget them."""
        self._kept.clear()

    def __call__(
        self,
        forward: Callable[[Tensor], Tensor],
        x: Tensor,
        tensors: Sequence[Tensor],
        objects: Sequence[object],
        constants: Callable[[], list[Tensor] | None],
    ) -> Tensor:
        """``forward(x)``.

        Args:
            tensors: parameters and buffers that it reads; a change of one counts a version.
            objects: what else it depends on, if another takes its place. Not the model, which would never be let go.
            constants: as of :func:`fastunet.ops.planned.planned`.
        """
        return planned(self._kept.made_from(tensors, objects), kind(x), forward, (x,), constants)
