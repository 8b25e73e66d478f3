"""Other projects' U-Nets as FastUNets, and back: :func:`convert` and :func:`export`.

``fastunet.convert`` is a function to call, with ``fastunet.convert.export`` on it; both are also to
be imported from here. How a family is described: :mod:`fastunet.convert.family`.
"""

from ..origin import Origin
from .convert import FAMILIES, convert, export

__all__ = ["FAMILIES", "Origin", "convert", "export"]
