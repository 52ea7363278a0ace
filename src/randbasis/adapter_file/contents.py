"""What a packed file holds, as it stands in the file: every rule of the format checked, and nothing made of it.

A file is vouched for by checking each number that it holds. That needs numpy and no torch, so that a command that
checks a file, or puts it into a store, starts at once.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from randbasis.adapter_file import container
from randbasis.adapter_file.codec import check_codes, pack_codes, unpack_codes
from randbasis.adapter_file.container import Container, RawTensor, data_order
from randbasis.adapter_file.paths import check_name
from randbasis.adapter_file.short_spec import short_matrices
from randbasis.adapter_file.spec import Spec, canonical, ordered, sha256
from randbasis.adapter_file.spec_reader import Digests, check_layers, naming, parse_spec
from randbasis.errors import (
    CoefficientCountError,
    CoefficientTensorError,
    CoefficientValueError,
    DigestError,
    ExtraTensorError,
    FormatVersionError,
    NotPackedError,
    SpecKeyError,
    SpecValueError,
)
from randbasis.files.locations import Location, local_path
from randbasis.precision import CODED, check_precision, run_lengths
from randbasis.ties import UNTIED

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "randbasis"
"""``__metadata__["format"]``."""
VERSION, TIED_VERSION = "1", "2"
"""``__metadata__["version"]``: the second is that of adapters whose matrices share coefficients, math (26); a reader
that knows the first alone refuses it by name."""
COEFFICIENTS, SCALES, STREAMS, EXTRA = "coefficients", "scales", "streams", "extra."
"""Names of the tensors; :data:`EXTRA` is how the name of what was saved beside the adapter begins."""

SAVED_PREFIX = "base_model.model."
"""What PEFT puts before the path of a module in the base model, in the names of what was saved beside the adapter."""

DIVERGED = "the training diverged or the file is damaged: use an earlier checkpoint"
"""Why a number may not be finite, and the way out."""

_BIT_PACKED = (4, 3, 2)
"""Bits of codes that share bytes."""
_STORED = {32: ("F32",), 16: ("F16", "BF16"), 8: ("I8",), 4: ("U8",), 3: ("U8",), 2: ("U8",)}
"""Bits of a coefficient → dtypes that the tensor of coefficients may have in the file."""


@dataclass(frozen=True)
class Contents:
    """The spec and the tensors of a packed file; one that exists keeps every rule of the format.

    Attributes:
        spec: everything but the numbers.
        tensors: name → tensor, as the file holds it.
        where: the file, for messages.
    """

    spec: Spec
    tensors: Mapping[str, RawTensor]
    where: str

    @classmethod
    def of(cls, spec: Spec, tensors: Mapping[str, RawTensor], where: str) -> "Contents":
        """What a file of that spec is to hold.

        Args:
            spec: of the adapter.
            tensors: name → tensor, codes of coefficients as I8, one a byte.
            where: for messages.

        Raises:
            PackedFileError: the adapter is one that no reader would take.
        """
        with naming(where):
            check_precision(spec.bits, spec.group)
        _check_names(spec, tensors, where)
        stored, coefficients = dict(tensors), tensors[COEFFICIENTS]
        if spec.bits in _BIT_PACKED:
            _check_tensor(COEFFICIENTS, coefficients, ("I8",), (coefficients.size,), where)
            check_count(spec, coefficients.size, where)
            check_codes(coefficients.array(), spec.bits, where)
            packed = pack_codes(coefficients.array(), spec.bits)
            stored[COEFFICIENTS] = RawTensor("U8", (len(packed),), packed)
        contents = cls(spec, stored, where)
        contents.__dict__["coefficients"] = coefficients  # known before they are asked for
        contents._check_length()
        check_layers(spec, where)
        contents._check_numbers()
        return contents

    @classmethod
    def load(cls, found: Container, where: str) -> "Contents":
        """Read what a safetensors file holds; see :func:`randbasis.adapter_file.read` for what is refused."""
        spec, digests = parse_spec(_spec_text(found, where), where)
        _check_version(spec, found.metadata["version"], where)
        _check_names(spec, found.tensors, where)
        contents = cls(spec, found.tensors, where)
        contents._check_length()
        check_layers(spec, where)
        contents._check_digests(digests)
        contents._check_numbers()
        return contents

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Contents":
        """Read the bytes of a file."""
        return cls.load(container.load(io.BytesIO(data), len(data), where), where)

    def to_bytes(self) -> bytes:
        """The canonical bytes of the file.

        Raises:
            PackedFileError: the spec is one that no reader would take.
        """
        spec, where = self.spec, self.where
        if spec.tie == UNTIED:
            document = spec.document(*_digests(self.tensors))
        elif spec.groups != ordered(spec.groups):
            raise _unordered(where)  # that of version 2 is none of its own
        else:
            document = spec.values(short_matrices(spec.groups, spec.method))
        text = canonical(document)
        parse_spec(text.decode(), where)
        version = _version_of(spec)
        seal = _seal(text, self.tensors, version)
        metadata = {"format": FORMAT, "version": version, "spec": text.decode(), "sha256": seal}
        return container.to_bytes(Container(metadata, self.tensors))

    @cached_property
    def coefficients(self) -> RawTensor:
        """As the file holds them, but codes as I8, one a byte."""
        stored = self.tensors[COEFFICIENTS]
        if self.spec.bits not in _BIT_PACKED:
            return stored
        codes = unpack_codes(stored.data, self.spec.count, self.spec.bits, self.where)
        return RawTensor("I8", (self.spec.count,), bytearray(codes))

    # --- the rules ---

    def _check_length(self) -> None:
        """Dtypes and lengths, before any memory is taken for what the spec says."""
        spec, stored = self.spec, self.tensors[COEFFICIENTS]
        _check_tensor(COEFFICIENTS, stored, _STORED[spec.bits], (stored.size,), self.where)
        if spec.bits not in _BIT_PACKED:
            check_count(spec, stored.size, self.where)
        elif stored.size != (wanted := -(-spec.count * spec.bits // 8)):
            raise _wrong_count(spec, f"a tensor of {wanted}", stored.size, self.where)
        if spec.streams_shape is not None and not spec.path_streams:
            _check_tensor(STREAMS, self.tensors[STREAMS], ("U32",), spec.streams_shape, self.where)
        if spec.bits in CODED:
            _check_tensor(SCALES, self.tensors[SCALES], ("F32",), (spec.run_count,), self.where)

    def _check_digests(self, said: Digests | None) -> None:
        if said is None:
            return  # the digest of the spec is one of everything
        coefficients, rest = _digests(self.tensors)
        for what, wanted, found in (
            ("coefficients", said.coefficients, coefficients),
            ("other tensors", said.rest, rest),
            ("list of layers (the base fingerprint)", said.fingerprint, self.spec.fingerprint),
        ):
            if wanted != found:
                raise _altered(self.where, what, wanted, found)

    def _check_numbers(self) -> None:
        """Everything of which a wrong value would be an adapter that no writer meant."""
        spec, values = self.spec, self.coefficients
        if spec.bits not in CODED:
            _check_finite(_as_floats(values), self.where)
            return
        codes, scales = values.array(), self.tensors[SCALES].array()
        check_codes(codes, spec.bits, self.where)
        if bool((scales < 0).any()):
            raise CoefficientValueError(f"{self.where}: scales must not be negative, got one; pack the adapter again")
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large is told below
            _check_finite(np.repeat(scales, run_lengths(spec.vector_lengths, spec.group)) * codes, self.where)


@dataclass(frozen=True)
class Verification:
    """What a packed file was found to be.

    Attributes:
        path: the file, or its URL.
        bytes: its size.
        sha256: of all of it.
        canonical: whether it is, byte for byte, what this package would write.
        contents: what it holds.
    """

    path: Location
    bytes: int
    sha256: str
    canonical: bool
    contents: Contents

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        spec = self.contents.spec
        return {
            "file": str(self.path),
            "bytes": self.bytes,
            "sha256": self.sha256,
            "canonical": self.canonical,
            "method": spec.method.name,
            "seed": spec.method.seed,
            "law": spec.method.law,
            "base_model": spec.base.name,
            "architecture": spec.base.architecture,
            "fingerprint": spec.fingerprint,
            "matrices": spec.size,
            "coefficients": spec.count,
            "bits": spec.bits,
            "group": spec.group,
            "extra_tensors": len(spec.extra),
            "task": spec.task.get("task"),
        }


def verify(path: Location) -> Verification:
    """Read and check all of a packed file, and tell what it is.

    Raises:
        RandbasisError: as :func:`randbasis.adapter_file.read`.
    """
    with container.opened(path) as (stream, size):
        contents = Contents.load(container.load(stream, size, str(path)), str(path))
        stream.seek(0)
        data = stream.read()
    return Verification(local_path(path) or path, len(data), sha256(data), contents.to_bytes() == data, contents)


def check_count(spec: Spec, found: int, where: str) -> None:
    """Raise unless there are as many coefficients as the spec implies.

    Raises:
        CoefficientCountError: there are more or fewer.
    """
    if found != spec.count:
        raise _wrong_count(spec, str(spec.count), found, where)


def not_finite(value: float, index: int, where: str) -> CoefficientValueError:
    """What is said of a coefficient that is NaN or infinite."""
    return CoefficientValueError(f"{where}: coefficients must be finite, got {value} at index {index}; {DIVERGED}")


def _spec_text(found: Container, where: str) -> str:
    metadata = found.metadata
    if metadata.get("format") != FORMAT:
        raise NotPackedError(
            f"{where}: a packed adapter must have the format {FORMAT!r} in its metadata, got "
            f"{metadata.get('format')!r}; `randbasis pack` makes a packed file of an adapter directory"
        )
    if metadata.get("version") not in (VERSION, TIED_VERSION):
        raise FormatVersionError(
            f"{where}: versions {VERSION} and {TIED_VERSION} of the format are what randbasis {version('randbasis')} "
            f"reads, got version {metadata.get('version')!r}; a newer version of randbasis reads a newer format: "
            "upgrade it"
        )
    missing = [key for key in ("spec", "sha256") if key not in metadata]
    if missing:
        raise SpecKeyError(f"{where}: its metadata must have {missing[0]!r}, got none; pack the adapter again")
    text = metadata["spec"]
    digest = _seal(text.encode(errors="surrogatepass"), found.tensors, metadata["version"])
    if digest != metadata["sha256"]:
        what = "spec" if metadata["version"] == VERSION else "spec with all tensors"
        raise _altered(where, what, metadata["sha256"], digest)
    return text


def _seal(text: bytes, tensors: Mapping[str, RawTensor], version: str) -> str:
    """SHA-256 of the spec; in version 2 of the tensors too, in the order of their data."""
    return sha256(text, *(tensors[name].data for name in data_order(tensors) if version != VERSION))


def _unordered(where: str) -> SpecValueError:
    return SpecValueError(
        f"{where}: the matrices of a spec must be in the order that group_matrices gives them, got another; make the "
        "spec with group_matrices"
    )


def _version_of(spec: Spec) -> str:
    return VERSION if spec.tie == UNTIED else TIED_VERSION


def _check_version(spec: Spec, found: str, where: str) -> None:
    if found != _version_of(spec):
        raise FormatVersionError(
            f"{where}: a file whose spec says tie={spec.tie!r} has version {_version_of(spec)} of the format, got "
            f"version {found!r}; pack the adapter again"
        )


def _check_names(spec: Spec, tensors: Mapping[str, RawTensor], where: str) -> None:
    named = {COEFFICIENTS, *(EXTRA + name for name in spec.extra)}
    named |= {SCALES} if spec.bits in CODED else set()
    named |= set() if spec.streams_shape is None or spec.path_streams else {STREAMS}
    for name in tensors.keys() - named:
        check_name(name, "the name of a tensor", where)
    unknown, missing = sorted(tensors.keys() - named), sorted(named - tensors.keys())
    if unknown or missing:
        found = f"{unknown[0]!r}, which it does not name" if unknown else f"no {missing[0]!r}"
        raise ExtraTensorError(
            f"{where}: its tensors must be the {len(named)} that the spec names (scales where coefficients are codes, "
            f"streams where no basis is shared), got {found}; pack the adapter again, or take the file from its source"
        )


def _check_tensor(name: str, tensor: RawTensor, dtypes: tuple[str, ...], shape: tuple[int, ...], where: str) -> None:
    if tensor.dtype not in dtypes or tensor.shape != shape:
        raise CoefficientTensorError(
            f"{where}: {name} must be {' or '.join(dtypes)} of shape {list(shape)} by the spec, got "
            f"{tensor.dtype} of shape {list(tensor.shape)}; pack the adapter again"
        )


def _wrong_count(spec: Spec, wanted: str, found: int, where: str) -> CoefficientCountError:
    return CoefficientCountError(
        f"{where}: {spec.size} matrices of {spec.method.name} with these options have {spec.count} coefficients, "
        f"{wanted} at {spec.bits} bits, got {found}; spec and coefficients do not belong together: pack again"
    )


def _as_floats(values: RawTensor) -> "NDArray[Any]":
    numbers = values.array()
    # The bits of a bfloat16 are the upper half of a float32's.
    return (numbers.astype("<u4") << 16).view("<f4") if values.dtype == "BF16" else numbers


def _check_finite(values: "NDArray[Any]", where: str) -> None:
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        raise not_finite(float(values[wrong[0]]), int(wrong[0]), where)


def _digests(tensors: Mapping[str, RawTensor]) -> tuple[str, str | None]:
    """SHA-256 of the coefficients, and of all other tensors where there are any."""
    rest = [tensors[name].data for name in data_order(tensors) if name != COEFFICIENTS]
    return sha256(tensors[COEFFICIENTS].data), sha256(*rest) if rest else None


def _altered(where: str, what: str, wanted: str | None, found: str | None) -> DigestError:
    return DigestError(
        f"{where}: the {what} must have the digest {wanted}, got {found}; the file was damaged or changed: "
        "take it from its source again"
    )
