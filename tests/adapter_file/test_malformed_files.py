"""A folder of attacks and accidents, and what each must raise."""

import tracemalloc
from pathlib import Path

import pytest
from malformed_files import FILES, FOLDER, GOOD, join, split
from packed_cases import CASES

from randbasis import errors
from randbasis.adapter_file import Base, PackedAdapter, Spec, SpecMatrix, read, verify
from randbasis.adapter_file.container import Container, RawTensor, to_bytes
from randbasis.adapter_file.spec import MatrixGroup, canonical, sha256
from randbasis.methods import Pranc


def test_the_folder_is_what_its_source_writes():
    written = {file.stem: file.read_bytes() for file in FOLDER.iterdir()}
    assert written == {name: data for name, (data, _) in FILES.items()}


def test_there_are_at_least_forty_and_they_are_small():
    assert len(FILES) >= 40
    assert sum(len(data) for data, _ in FILES.values()) < 200_000


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_file_is_refused(name: str):
    path = FOLDER / f"{name}.safetensors"
    expected = FILES[name][1]
    with pytest.raises(expected) as caught:
        read(path)
    assert type(caught.value) is expected
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "; " in message  # the way out
    assert len(message) < 1500


def test_every_class_of_a_broken_rule_has_a_file():
    rules = {e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.PackedFileError)}
    others = {errors.UnknownMethodError, errors.LawError, errors.RankError, errors.PrecisionError}
    others |= {errors.CoefficientCountError, errors.CoefficientValueError}
    assert {expected for _, expected in FILES.values()} == rules - {errors.PackedFileError} | others


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("one-byte-short", ["1135", "1136", "copy it again"]),
        ("header-longer-than-limit", ["16777216", "16777217", "take it from its source"]),
        ("version-3", ["versions 1 and 2", "'3'", "randbasis", "upgrade"]),
        ("spec-key-unknown", ["'adaptor'", "upgrade"]),
        ("method-unknown", ["'lora'", "nola"]),
        ("coefficients-too-many", ["49 coefficients", "got 56"]),
        ("coefficients-nan", ["finite", "nan", "index 0", "earlier checkpoint"]),
        ("matrix-climbs", ["'a/../../b.*'", "relative name"]),
        ("extra-unnamed", ["'extra.base_model.model.steps'"]),
        ("code-minus-eight", ["±7", "-8"]),
    ],
)
def test_the_message_says_what_was_found(name: str, words: list[str]):
    with pytest.raises(errors.RandbasisError) as caught:
        read(FOLDER / f"{name}.safetensors")
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_missing_file_and_a_directory(tmp_path: Path):
    with pytest.raises(errors.PackedFileMissingError, match="not there"):
        read(tmp_path / "nothing")
    with pytest.raises(errors.PackedFileMissingError, match="a directory; `randbasis pack`"):
        verify(tmp_path)


def test_a_claim_of_many_matrices_takes_no_memory():
    """A billion layers stand in twenty bytes; they are counted, not listed."""
    tracemalloc.start()
    with pytest.raises(errors.SpecValueError, match="262144"):
        PackedAdapter.from_bytes(FILES["layers-of-a-billion"][0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("named", ["streams", "scales"])
def test_a_claim_that_one_tensor_backs_and_another_does_not_is_counted_too(named: str):
    """Two bits a matrix back a list of a quarter of a million; it is not made where the streams are not as many."""
    one = Pranc(num_basis=1, share_basis=named == "scales")
    layers = SpecMatrix("layers.*.up", "", 0, 3, 3, 4, one)
    spec = Spec(one, Base(), (MatrixGroup(layers, ((range(1 << 18),),)),), 2)
    spec.__dict__["fingerprint"] = "0" * 64  # not worked out
    text = canonical(spec.document("0" * 64, "0" * 64)).decode()
    tensors = {
        "coefficients": RawTensor("U8", (1 << 16,), bytes(1 << 16)),
        "scales": RawTensor("F32", (0,), b""),
        **({"streams": RawTensor("U32", (0,), b"")} if named == "streams" else {}),
    }
    metadata = {"format": "randbasis", "version": "1", "spec": text, "sha256": sha256(text.encode())}
    data = to_bytes(Container(metadata, tensors))
    tracemalloc.start()
    with pytest.raises(errors.CoefficientTensorError, match=rf"{named} must be .* of shape \[262144"):
        PackedAdapter.from_bytes(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_a_header_that_the_file_does_not_back_is_not_read(tmp_path: Path):
    """Sixteen mebibytes promised, a sparse file behind: the refusal comes before the data is touched."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(GOOD)
        file.truncate(1 << 40)
    with pytest.raises(errors.TruncatedFileError, match=str(1 << 40)):
        read(path)


def test_verify_tells_a_file_that_is_not_canonical(tmp_path: Path):
    header, _, data = split(GOOD)
    (tmp_path / "good").write_bytes(GOOD)
    (tmp_path / "other").write_bytes(join(header, data))
    assert verify(tmp_path / "good").canonical
    other = verify(tmp_path / "other")
    assert not other.canonical
    assert other.contents.to_bytes() == GOOD == CASES["nola"].to_bytes()
