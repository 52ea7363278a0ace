"""Whether the coefficients of two adapters belong to one basis, and may therefore be added."""

from dataclasses import fields
from typing import Any

from randbasis.adapter_file import PackedAdapter, SpecMatrix
from randbasis.errors import BaseMismatchError, BasisMismatchError, MatrixMismatchError
from randbasis.methods import Method

SHOWN = 3
"""Matrices that a message names."""


def check_same_basis(
    first: PackedAdapter, second: PackedAdapter, names: tuple[str, str], *, base_name: str | None = None
) -> None:
    """Raise unless each coefficient of one adapter multiplies the same frozen matrix as that of the other.

    Args:
        first: an adapter.
        second: another one.
        names: what messages call them.
        base_name: says that both are for this base, whatever they call it; None compares the names.

    Raises:
        BasisMismatchError: method, seed, law, another hyper-parameter or the stored streams differ.
        MatrixMismatchError: they adapt different matrices.
        BaseMismatchError: they were made for bases of other architectures, shapes or names.
    """
    _check_method(first.spec.method, second.spec.method, names)
    if first.spec.tie != second.spec.tie:
        raise _other_basis(names, f"tie={first.spec.tie!r} and {second.spec.tie!r}")
    _check_base(first, second, names, base_name)
    own, other = ({(one.name, one.part): one for one in packed.spec.matrices} for packed in (first, second))
    if own.keys() != other.keys():
        lacking = [(names[1], own.keys() - other.keys()), (names[0], other.keys() - own.keys())]
        raise MatrixMismatchError(
            f"{_both(names)} must adapt the same matrices to be combined, but "
            f"{'; '.join(f'{who} has no {_listed(keys)}' for who, keys in lacking if keys)}; "
            "train them with the same targets, or merge them into the model one after the other"
        )
    for key, one in own.items():
        _check_matrix(one, other[key], names)
    if first.streams is not None and not (second.streams is not None and first.streams.equal(second.streams)):
        raise BasisMismatchError(
            f"{_both(names)} must have the same streams of their bases to be combined, those stored differ: they were "
            "made on models that call their layers otherwise; train them from the same model class"
        )


def _check_method(first: Method, second: Method, names: tuple[str, str]) -> None:
    if first.name != second.name:
        raise _other_basis(names, f"method {first.name!r} and {second.name!r}")
    differing = [
        f"{f.name}={getattr(first, f.name)!r} and {getattr(second, f.name)!r}"
        for f in fields(first)
        if f.name != "basis_storage" and getattr(first, f.name) != getattr(second, f.name)
    ]
    if differing:
        raise _other_basis(names, ", ".join(differing))


def _check_base(first: PackedAdapter, second: PackedAdapter, names: tuple[str, str], base_name: str | None) -> None:
    one, two = first.spec.base, second.spec.base
    pairs: list[tuple[str, Any, Any]] = [
        ("type", one.architecture, two.architecture),
        ("digest of weights", one.weights, two.weights),
    ]
    if base_name is None:
        pairs.append(("name", one.name, two.name))
    for what, mine, theirs in pairs:
        if mine and theirs and mine != theirs:
            way = "say base_name if both are one model" if what == "name" else "use adapters for one base"
            raise BaseMismatchError(
                f"{_both(names)} must be for one base model to be combined, got the {what} {mine!r} and {theirs!r}; "
                f"{way}"
            )


def _check_matrix(one: SpecMatrix, two: SpecMatrix, names: tuple[str, str]) -> None:
    shapes = [(m.out_features, m.in_features, m.start, m.rows) for m in (one, two)]
    if shapes[0] != shapes[1]:
        raise BaseMismatchError(
            f"{_both(names)} must be for one base model to be combined, but {one.name!r} is {shapes[0]} and {shapes[1]}"
            " (out, in, first row, rows); use adapters for one base"
        )
    if one.method != two.method:
        _check_method(one.method, two.method, (f"{names[0]} in {one.name!r}", names[1]))


def _other_basis(names: tuple[str, str], what: str) -> BasisMismatchError:
    return BasisMismatchError(
        f"{_both(names)} must have one basis to be combined, they have {what}: their coefficients multiply different "
        "frozen matrices, and a sum of such numbers means nothing; train them with the same seed and options, or "
        "export both as LoRA and combine those with PEFT (add_weighted_adapter, combination_type='cat')"
    )


def _both(names: tuple[str, str]) -> str:
    return f"{names[0]} and {names[1]}"


def _listed(keys: set[tuple[str, str]]) -> str:
    shown = [f"{name}[{part}]" if part else name for name, part in sorted(keys)]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(map(repr, shown[:SHOWN])) + more
