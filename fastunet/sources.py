"""Whether something that was made from tensors still holds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Sources:
    """Tensors as they are now; what was made from them holds while each is the same tensor, unchanged.

    Writing through ``.data`` counts no version and is not seen. Inference tensors have none at all.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Aliases keep the memory alive, so that a new tensor cannot appear at an old address.
        self._alive = [t.detach() for t in tensors]
        self._seen = [(t.data_ptr(), t._version, t.dtype) for t in tensors]

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are these, and nothing changed since."""
        return [(t.data_ptr(), t._version, t.dtype) for t in tensors] == self._seen
