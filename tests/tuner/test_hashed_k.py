"""The k of a hashed basis is a part of what coefficients mean: as many coefficients of another k are other matrices."""

from dataclasses import replace

import pytest
import torch
from support.tuner_cases import Case, outputs

from randbasis import put
from randbasis.adapter_file import PackedAdapter, read
from randbasis.adapters import open_adapter
from randbasis.adapters.packed import pack_adapter, packed_of
from randbasis.arithmetic.same_basis import check_same_basis
from randbasis.errors import BasisMismatchError, CoefficientCountError, LawError, RandbasisError

NOLA, PRANC = Case("linear", "nola-hashed"), Case("linear", "pranc-hashed")
#: As many coefficients, given to the two sides otherwise.
ONE, OTHER = {"num_basis": 6, "num_basis_b": 5}, {"num_basis": 5, "num_basis_b": 6}


def packed(case: Case, path, **options) -> PackedAdapter:
    case.adapted(**options).save_pretrained(path)
    return packed_of(open_adapter(path), bits=32)


def test_a_file_says_it_and_gives_the_model_back(tmp_path) -> None:
    model = NOLA.adapted()
    model.save_pretrained(tmp_path / "folder")
    pack_adapter(tmp_path / "folder", tmp_path / "file", bits=32)
    found = read(tmp_path / "file")
    method = found.spec.method
    assert (method.law, method.identity()["num_basis"], method.identity()["num_basis_b"]) == ("hashed", 6, 5)
    again = put(NOLA.base(), found)
    assert torch.equal(outputs(again, NOLA.batch()), outputs(model, NOLA.batch()))
    torch.testing.assert_close(
        outputs(again.merge_and_unload(), NOLA.batch()), outputs(model, NOLA.batch()), rtol=1e-4, atol=1e-5
    )


def test_the_same_numbers_under_another_k_are_another_change(tmp_path) -> None:
    first = packed(NOLA, tmp_path / "one", **ONE)
    second = packed(NOLA, tmp_path / "other", **OTHER)
    assert first.spec.count == second.spec.count
    claimed = replace(second, coefficients=first.coefficients)
    with pytest.raises(BasisMismatchError, match="num_basis=6 and 5, num_basis_b=5 and 6"):
        check_same_basis(first, claimed, ("first", "second"))
    here, there = (outputs(put(NOLA.base(), one), NOLA.batch()) for one in (first, claimed))
    assert not torch.allclose(here, there, atol=1e-2)


def test_a_folder_of_another_k_is_refused(tmp_path) -> None:
    for case, there, here in ((NOLA, ONE, OTHER), (PRANC, {"num_basis": 6}, {"num_basis": 7})):
        path = tmp_path / case.method
        case.adapted(**there).save_pretrained(path)
        model = case.adapted(fill_seed=2, **here)
        before = outputs(model, case.batch())
        with pytest.raises((RandbasisError, RuntimeError), match=r"num_basis|nola_a|pranc_a"):
            model.load_adapter(str(path), "default")
        assert torch.equal(outputs(model, case.batch()), before)


def test_a_file_that_counts_otherwise_is_refused(tmp_path) -> None:
    first = packed(PRANC, tmp_path / "one")
    larger = replace(first.spec.method, num_basis=7)
    groups = tuple(replace(group, like=replace(group.like, method=larger)) for group in first.spec.groups)
    with pytest.raises(CoefficientCountError):
        PackedAdapter.of(replace(first.spec, method=larger, groups=groups), first.coefficients)


@pytest.mark.parametrize(("method", "law"), [("nola", "hashed(6)"), ("vera", "hashed"), ("randlora", "hashed")])
def test_a_configuration_that_means_nothing_is_refused(method: str, law: str) -> None:
    with pytest.raises(LawError, match="law must"):
        Case("linear", method).adapted(law=law)
