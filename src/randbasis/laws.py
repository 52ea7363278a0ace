"""What a basis is named by: a law, a seed and a stream, math (2)-(5), (25). No tensor is needed to check them."""

import hashlib
import math
import operator
import re
from dataclasses import dataclass, field, replace
from typing import SupportsIndex

from randbasis.errors import BasisShapeError, LawError, SeedError

BLOCK_BITS = 128
"""Bits that one evaluation of the generator gives."""
MATRICES_LIMIT = 1 << 16
"""Most matrices of a hashed basis: a word of 32 bits names each of them about as often as any other."""


@dataclass(frozen=True, slots=True)
class Law:
    """How the random bits of an entry become an integer; see the table of laws in math.md.

    Attributes:
        name: canonical name, ``"sign"``, ``"uniform"``, ``"normal"``, ``"sparse(s)"`` or ``"hashed(k)"``; ``"hashed"``
            until it is known how many matrices the basis has.
        bits: bits that one entry takes from a block of 128.
        variance: exact variance of the integer entry; NaN for ``"hashed"``.
        threshold: ``t`` of the sparse law, 0 for the others.
        matrices: ``k`` of the hashed law, 0 for the others and for ``"hashed"``.
        disjoint: whether each place belongs to one matrix of the basis, and is 0 in all others, math (25).
        unit_scale: the real factor of math (5) that gives the basis unit variance.
        power: the greatest power of two that is not above :attr:`unit_scale`: what entries are multiplied by, math (5).
            An entry times a power of two is exact in every floating dtype, and a sum of such entries is as large as one
            of unit variance, within a factor of two: so it is stored in float16 where the result itself can be. A sum
            of disjoint matrices has one term in each place and is as large as its coefficients: there it is 1.
        unit: the part of :attr:`unit_scale` that entries do not carry: in [1, 2), or ``√k`` for the hashed law.
    """

    name: str
    bits: int
    variance: float
    threshold: int = 0
    matrices: int = 0
    disjoint: bool = field(init=False, repr=False, compare=False)
    unit_scale: float = field(init=False, repr=False, compare=False)
    power: float = field(init=False, repr=False, compare=False)
    unit: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Once: a server asks for them with every adapter that it binds.
        disjoint, scale = self.kind == "hashed", 1.0 / math.sqrt(self.variance)
        power = 1.0 if disjoint else 2.0 ** math.floor(math.log2(scale))
        for name, value in (("disjoint", disjoint), ("unit_scale", scale), ("power", power), ("unit", scale / power)):
            object.__setattr__(self, name, value)

    @property
    def entries_per_block(self) -> int:
        """``E`` of math (2): entries in one block of 128 bits."""
        return BLOCK_BITS // self.bits

    @property
    def kind(self) -> str:
        """The name without its parameter: ``"sign"``, ``"uniform"``, ``"normal"``, ``"sparse"`` or ``"hashed"``."""
        return self.name.partition("(")[0]

    def of(self, matrices: int) -> "Law":
        """The law of a basis of so many matrices: ``"hashed"`` becomes ``"hashed(k)"``, any other law stays."""
        if not self.disjoint or self.matrices:
            return self
        if not 1 <= matrices <= MATRICES_LIMIT:
            raise LawError(
                f"law 'hashed' must be of 1 to {MATRICES_LIMIT} matrices, got {matrices}; use for example 'hashed(128)'"
            )
        return replace(self, name=f"hashed({matrices})", variance=1.0 / matrices, matrices=matrices)


_LAWS = {
    "sign": Law("sign", bits=1, variance=1.0),
    "uniform": Law("uniform", bits=8, variance=21845.0),
    "normal": Law("normal", bits=16, variance=4.0),
    "hashed": Law("hashed", bits=32, variance=math.nan),
}
_HASHED = re.compile(r"hashed\(\s*([0-9]{1,9})\s*\)")
_SPARSE = re.compile(r"sparse\(\s*([0-9.]+(?:e[0-9]+)?)\s*\)")


def parse_law(name: str | Law) -> Law:
    """The law of that name.

    Args:
        name: ``"sign"``, ``"uniform"``, ``"normal"`` or ``"sparse(s)"`` with ``2 <= s <= 65536``: an entry is ``+1``
            and ``-1`` with probability ``1/s`` each, else 0; or ``"hashed(k)"`` with ``1 <= k <= 65536``: the law of a
            basis of ``k`` matrices, each place of which belongs to one of them, math (25). ``"hashed"`` leaves ``k`` to
            whoever knows how many matrices there are.

    Raises:
        LawError: the name is none of these, or ``s`` or ``k`` is out of range.
    """
    if isinstance(name, Law):
        return name
    if name in _LAWS:
        return _LAWS[name]
    hashed = _HASHED.fullmatch(name)
    if hashed:
        return _LAWS["hashed"].of(int(hashed.group(1)))
    match = _SPARSE.fullmatch(name)
    try:
        sparsity = float(match.group(1)) if match else math.nan
    except ValueError:
        sparsity = math.nan
    if not 2.0 <= sparsity <= 65536.0:
        raise LawError(
            "law must be 'sign', 'uniform', 'normal', 'sparse(s)' with 2 <= s <= 65536, or 'hashed', got "
            f"{name!r}; use for example law='sign' or law='sparse(6)'"
        )
    threshold = round(65536 / sparsity)
    # All digits: ops get a law by its name, and a rounded s may have another threshold.
    return Law(
        f"sparse({repr(sparsity).removesuffix('.0')})", bits=16, variance=2 * threshold / 65536, threshold=threshold
    )


def check_seed(seed: SupportsIndex) -> int:
    """The seed as a Python integer.

    Raises:
        SeedError: it is not an integer, is negative, or needs more than 64 bits.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise SeedError(f"seed must be an integer from 0 to 2**64 - 1, got {seed!r}; pass for example seed=0")
    value = operator.index(seed)
    if not 0 <= value < 2**64:
        raise SeedError(f"seed must be from 0 to 2**64 - 1, got {value}; take it modulo 2**64")
    return value


def stream_of(name: str | int) -> int:
    """The 32-bit stream of a name, math (4); an integer is a stream already.

    Args:
        name: ``"<method>/<role>"`` for a basis shared by all layers, ``"<method>/<role>/<module path>"`` for the
            basis of one matrix, or the stream itself.

    Raises:
        BasisShapeError: neither a name nor an integer of 32 unsigned bits.
    """
    if isinstance(name, str):
        return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:4], "little")
    if isinstance(name, bool) or not hasattr(name, "__index__") or not 0 <= name < 2**32:
        raise BasisShapeError(
            f"a stream must be an integer from 0 to 2**32 - 1, got {name!r}; use stream_of('method/role')"
        )
    return operator.index(name)
