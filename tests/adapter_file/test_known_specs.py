"""A spec that is known already against the same spec read anew: adapters that differ in their numbers share it."""

import json
from collections.abc import Iterator

import pytest
from packed_cases import METHODS, PRECISIONS, adapter_of, heads, numbers

from randbasis.adapter_file import PackedAdapter, spec_reader
from randbasis.adapter_file.spec import sha256
from randbasis.adapter_file.spec_reader import parse_spec
from randbasis.errors import PackedFileError, SpecValueError

ONE, TWO = sha256(b"one"), sha256(b"two")


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    spec_reader._KNOWN.clear()
    yield
    spec_reader._KNOWN.clear()


def text_of(**changes: object) -> str:
    adapter = adapter_of(METHODS["nola"])
    document = json.loads(json.dumps(adapter.spec.document(ONE, None)))
    return json.dumps(document | changes, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("bits", "group"), PRECISIONS)
def test_adapters_of_one_kind_share_a_spec_and_keep_their_numbers(method: str, bits: int, group: int):
    first = adapter_of(METHODS[method], bits, group, extra=heads())
    other = adapter_of(METHODS[method], bits, group, extra=heads(), values=numbers(first.spec.count, seed=2))
    files = [first.to_bytes(), other.to_bytes()]
    read = [PackedAdapter.from_bytes(data) for data in files]
    assert read[0].spec is read[1].spec
    assert [one.to_bytes() for one in read] == files


def test_a_known_spec_takes_the_digests_of_the_text():
    first, digests = parse_spec(text_of(), "file")
    again, others = parse_spec(text_of(digest=TWO), "file")
    assert again is first
    assert (digests.coefficients, others.coefficients) == (ONE, TWO)
    assert digests.fingerprint == others.fingerprint == first.fingerprint


def test_any_other_difference_is_another_spec():
    first, _ = parse_spec(text_of(), "file")
    for change in ({"seed": 7}, {"peft": {"target_modules": ["q"]}}, {"digest_rest": TWO}):
        other, digests = parse_spec(text_of(**change), "file")
        assert other is not first
        assert digests.rest == change.get("digest_rest")


def test_digests_in_other_places_are_no_digests():
    first, _ = parse_spec(text_of(peft={"digest": ONE}), "file")
    other, digests = parse_spec(text_of(digest=TWO, peft={"digest": TWO}), "file")
    assert (first.peft, other.peft) == ({"digest": ONE}, {"digest": TWO})
    assert digests.coefficients == TWO
    _, digests = parse_spec(text_of(peft={"digest_rest": TWO}), "file")
    assert digests.rest is None


@pytest.mark.parametrize("digest", ["", "\0", "\\u0000", ONE[:-1], ONE.upper(), ONE + "0"], ids=ascii)
def test_a_bad_digest_is_refused_although_the_rest_is_known(digest: str):
    good = text_of()
    parse_spec(good, "file")
    with pytest.raises(PackedFileError, match="file"):
        parse_spec(good.replace(ONE, digest), "file")


def test_what_is_refused_is_refused_again():
    for _ in range(2):
        with pytest.raises(SpecValueError):
            parse_spec(text_of(matrices=[]), "file")
    assert not spec_reader._KNOWN


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch):
    for seed in range(spec_reader.KNOWN_LIMIT + 5):
        parse_spec(text_of(seed=seed), "file")
    assert len(spec_reader._KNOWN) == spec_reader.KNOWN_LIMIT
    monkeypatch.setattr(spec_reader, "KNOWN_MATRICES", 1)
    spec_reader._KNOWN.clear()
    parse_spec(text_of(), "file")
    monkeypatch.setattr(spec_reader, "KNOWN_TEXT", 10)
    monkeypatch.setattr(spec_reader, "KNOWN_MATRICES", 4096)
    parse_spec(text_of(), "file")
    assert not spec_reader._KNOWN


@pytest.mark.parametrize("hidden", ['"digest" :', '"digest": ', r'"\u0064igest":'])
def test_a_digest_of_the_task_is_not_taken_for_one_that_is_written_otherwise(hidden: str):
    """The spec's own digest is there as JSON allows, and the one inside the task is equal, at first."""
    text = text_of(task={"task": "causal-lm", "digest": ONE}).replace(f',"digest":"{ONE}"', f',{hidden}"{ONE}"', 1)
    assert text.count(f'{hidden}"{ONE}"') == text.count(f'"digest":"{ONE}"') == 1
    first, digests = parse_spec(text, "file")
    other, others = parse_spec(text.replace(f'"digest":"{ONE}"', f'"digest":"{TWO}"'), "file")
    assert (digests.coefficients, others.coefficients) == (ONE, ONE)
    assert (first.task["digest"], other.task["digest"]) == (ONE, TWO)
