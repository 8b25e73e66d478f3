"""The parity harness: does a fast model compute what its reference does, as accurately?

One rule decides (:func:`compare`), for users as for the tests of the kernels. Three results of one
computation are compared: the **truth** (the reference in float64), the **baseline** (the reference
in the working dtype: what its user has today) and the **candidate** (the fast model in that dtype).
"""

from .harness import verify
from .report import Report
from .rule import Parity, compare

__all__ = ["Parity", "Report", "compare", "verify"]
