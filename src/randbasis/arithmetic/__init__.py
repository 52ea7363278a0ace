"""ADAPTERS → THEIR DIFFERENCE, THEIR MEAN: what two adapters have in common, and weighted sums of coefficients.

Differences are of ΔW, so any two adapters for one base can be compared. Sums are of coefficients, which form a vector
space for one method, seed and shape alone.
"""

from randbasis.arithmetic.average import Average, average_adapters
from randbasis.arithmetic.changes import Changes, read_changes
from randbasis.arithmetic.difference import Difference, LayerDifference, difference
from randbasis.arithmetic.same_basis import check_same_basis

__all__ = [
    "Average",
    "Changes",
    "Difference",
    "LayerDifference",
    "average_adapters",
    "check_same_basis",
    "difference",
    "read_changes",
]
