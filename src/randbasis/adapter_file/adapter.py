"""A packed adapter: spec and numbers together, checked against each other, to bytes and back."""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor

from randbasis.adapter_file import container
from randbasis.adapter_file.codec import check_codes, pack_codes, unpack_codes
from randbasis.adapter_file.container import Container, data_order, tensor_bytes
from randbasis.adapter_file.paths import check_name
from randbasis.adapter_file.spec import Spec, SpecMatrix, canonical, sha256
from randbasis.adapter_file.spec_reader import Digests, check_layers, parse_spec
from randbasis.codes import dequantize, narrowed, quantize, run_lengths
from randbasis.errors import (
    CoefficientCountError,
    CoefficientTensorError,
    CoefficientValueError,
    DigestError,
    ExtraTensorError,
    FormatVersionError,
    NotPackedError,
    PrecisionError,
    SpecKeyError,
)
from randbasis.files.locations import Location, local_path
from randbasis.files.whole_file import write
from randbasis.methods import Delta
from randbasis.precision import CODED, check_precision

FORMAT = "randbasis"
"""``__metadata__["format"]``."""
VERSION = "1"
"""``__metadata__["version"]``: the version of the format that is written, and the only one that is read."""
COEFFICIENTS, SCALES, STREAMS, EXTRA = "coefficients", "scales", "streams", "extra."
"""Names of the tensors; :data:`EXTRA` is how the name of what was saved beside the adapter begins."""

_FLOATS = {32: (torch.float32,), 16: (torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter as a packed file holds it.

    Attributes:
        spec: everything but the numbers.
        coefficients: ``[n]`` float32, float16 or bfloat16; codes as int8 where they are quantized.
        scales: ``[runs]`` float32 of quantized coefficients, else None.
        streams: ``[matrices, roles]`` int64 where the basis is not shared by all layers, math (4), else None.
        extra: what training saved beside the adapter, by name.
    """

    spec: Spec
    coefficients: Tensor
    scales: Tensor | None = None
    streams: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @classmethod
    def of(
        cls, spec: Spec, values: Tensor, *, streams: Tensor | None = None, extra: Mapping[str, Tensor] | None = None
    ) -> "PackedAdapter":
        """Store coefficients at the precision that a spec names.

        Args:
            spec: ``bits`` and ``group`` are what is asked for; ``extra`` is filled in here.
            values: ``[n]`` floating, matrices in the spec's order and in each the method's. With 16 bits, bfloat16
                stays; with 32, half precision stays too.
            streams: ``[matrices, roles]`` where the basis is not shared.
            extra: what else to keep.

        Raises:
            PrecisionError: there is no such precision, or a value does not fit it.
            CoefficientCountError: there are more or fewer values than the spec implies.
            CoefficientValueError: a value is not finite.
        """
        check_precision(spec.bits, spec.group)
        _check_count(spec, values, "coefficients to pack")
        _check_finite(values, "coefficients to pack")
        extra = dict(sorted((extra or {}).items()))
        scales = None
        if spec.bits in CODED:
            values, scales = quantize(values, run_lengths(spec.vector_lengths, spec.group), spec.bits)
        elif values.dtype not in (torch.float16, torch.bfloat16):
            values = narrowed(values, torch.float32 if spec.bits == 32 else torch.float16)
        bits = spec.bits if scales is not None else 8 * values.element_size()
        return cls(replace(spec, bits=bits, extra=tuple(extra)), values, scales, streams, extra)

    def values(self) -> Tensor:
        """The coefficients ``[n]`` as numbers: as stored, or float32 where they are codes."""
        if self.scales is None:
            return self.coefficients
        return dequantize(self.coefficients, self.scales, run_lengths(self.spec.vector_lengths, self.spec.group))

    def at(self, bits: int, group: int = 0, *, bfloat16: bool = False) -> "PackedAdapter":
        """The same adapter with its coefficients stored at another precision, as :meth:`of` stores them.

        Raises:
            PrecisionError: as :meth:`of`; or ``bfloat16`` is asked for at other bits than 16.
        """
        if bfloat16 and bits != 16:
            raise PrecisionError(f"bfloat16 has 16 bits, got bits={bits}; leave one of the two out")
        spec, values = replace(self.spec, bits=bits, group=group), self.values()
        return PackedAdapter.of(spec, values.bfloat16() if bfloat16 else values, streams=self.streams, extra=self.extra)

    def matrices(self) -> Iterator[tuple[SpecMatrix, Delta]]:
        """Each adapted matrix with its ΔW."""
        split = cast("Callable[[Tensor, list[int]], tuple[Tensor, ...]]", torch.split)
        vectors = iter(split(self.values(), self.spec.vector_lengths))
        streams = None if self.streams is None else cast("list[list[int]]", self.streams.tolist())
        for index, one in enumerate(self.spec.matrices):
            bound = one.bind(None if streams is None else tuple(streams[index]))
            yield one, bound.delta({name: next(vectors).reshape(shape) for name, shape in one.shapes.items()})

    # --- bytes ---

    def to_bytes(self) -> bytes:
        """The canonical bytes of the file.

        Raises:
            PackedFileError: the adapter is one that no reader would take.
        """
        where = "the adapter to write"
        _check_parts(self, where)
        check_layers(self.spec, where)
        stored = self.coefficients
        if self.spec.bits in (4, 3, 2):
            stored = pack_codes(self.coefficients, self.spec.bits)
        tensors = {COEFFICIENTS: stored, **{EXTRA + name: tensor for name, tensor in self.extra.items()}}
        if self.scales is not None:
            tensors[SCALES] = self.scales
        if self.streams is not None:
            tensors[STREAMS] = self.streams.to(torch.uint32)
        digest, rest = _digests(tensors)
        text = canonical(self.spec.document(digest, rest))
        parse_spec(text.decode(), where)
        metadata = {"format": FORMAT, "version": VERSION, "spec": text.decode(), "sha256": sha256(text)}
        return container.to_bytes(Container(metadata, tensors))

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "the packed adapter") -> "PackedAdapter":
        """Read the bytes of a file; see :func:`randbasis.adapter_file.read` for what is refused."""
        return _from_container(container.load(io.BytesIO(data), len(data), where), where)

    def write(self, path: Location, *, overwrite: bool = False) -> None:
        """Write the file; a kill at any point leaves the old file or the new one.

        Args:
            path: of the file, or a URL that fsspec writes.
            overwrite: replace the file.

        Raises:
            OutputExistsError: it exists and ``overwrite`` is not given.
            SaveError: it could not be written.
            RemoteError: it is behind a URL that could not be written.
        """
        write(path, self.to_bytes(), overwrite=overwrite)


def read(path: Location) -> PackedAdapter:
    """Read and check a packed file.

    Args:
        path: of the file, or a URL that fsspec opens: ``s3://``, ``hf://``, ``memory://``, …

    Raises:
        RemoteError: it is behind a URL that could not be reached.
        PackedFileMissingError: it is not there.
        PackedFileError: it breaks a rule of the format; each rule has its class.
        UnknownMethodError: its method is not known.
        LawError: its law is not known.
        CoefficientCountError: it has more or fewer coefficients than its spec implies.
        CoefficientValueError: a coefficient is NaN or infinite.
        RandbasisError: a hyper-parameter is one that its method cannot take.
    """
    return _from_container(container.read(path)[0], str(path))


@dataclass(frozen=True)
class Verification:
    """What a packed file was found to be.

    Attributes:
        path: the file, or its URL.
        bytes: its size.
        sha256: of all of it.
        canonical: whether it is, byte for byte, what this package would write.
        adapter: its content.
    """

    path: Location
    bytes: int
    sha256: str
    canonical: bool
    adapter: PackedAdapter

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        spec = self.adapter.spec
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
        RandbasisError: as :func:`read`.
    """
    with container.opened(path) as (stream, size):
        adapter = _from_container(container.load(stream, size, str(path)), str(path))
        stream.seek(0)
        data = stream.read()
    return Verification(local_path(path) or path, len(data), sha256(data), adapter.to_bytes() == data, adapter)


def _from_container(found: Container, where: str) -> PackedAdapter:
    spec, digests = parse_spec(_spec_text(found.metadata, where), where)
    tensors = dict(found.tensors)
    _check_names(spec, tensors, where)
    _check_stored(spec, tensors[COEFFICIENTS], where)
    check_layers(spec, where)
    _check_digests(spec, digests, tensors, where)
    coefficients = tensors[COEFFICIENTS]
    if spec.bits in (4, 3, 2):
        coefficients = unpack_codes(coefficients, spec.count, spec.bits, where)
    streams = tensors.get(STREAMS)
    adapter = PackedAdapter(
        spec,
        coefficients,
        tensors.get(SCALES),
        None if streams is None else streams.to(torch.int64),
        {name: tensors[EXTRA + name] for name in spec.extra},
    )
    _check_parts(adapter, where)
    return adapter


def _spec_text(metadata: Mapping[str, str], where: str) -> str:
    if metadata.get("format") != FORMAT:
        raise NotPackedError(
            f"{where}: a packed adapter must have the format {FORMAT!r} in its metadata, got "
            f"{metadata.get('format')!r}; `randbasis pack` makes a packed file of an adapter directory"
        )
    if metadata.get("version") != VERSION:
        raise FormatVersionError(
            f"{where}: version {VERSION} of the format is what randbasis {version('randbasis')} reads, got version "
            f"{metadata.get('version')!r}; a newer version of randbasis reads a newer format: upgrade it"
        )
    missing = [key for key in ("spec", "sha256") if key not in metadata]
    if missing:
        raise SpecKeyError(f"{where}: its metadata must have {missing[0]!r}, got none; pack the adapter again")
    text = metadata["spec"]
    digest = sha256(text.encode(errors="surrogatepass"))
    if digest != metadata["sha256"]:
        raise _altered(where, "spec", metadata["sha256"], digest)
    return text


def _check_names(spec: Spec, tensors: Mapping[str, Tensor], where: str) -> None:
    named = {COEFFICIENTS, *(EXTRA + name for name in spec.extra)}
    named |= {SCALES} if spec.bits in CODED else set()
    named |= set() if spec.method.shares_basis else {STREAMS}
    for name in tensors.keys() - named:
        check_name(name, "the name of a tensor", where)
    unknown, missing = sorted(tensors.keys() - named), sorted(named - tensors.keys())
    if unknown or missing:
        found = f"{unknown[0]!r}, which it does not name" if unknown else f"no {missing[0]!r}"
        raise ExtraTensorError(
            f"{where}: its tensors must be the {len(named)} that the spec names, got {found}; "
            "take the file from its source again"
        )


def _check_stored(spec: Spec, stored: Tensor, where: str) -> None:
    """Dtype and length of the coefficients as they stand in the file, before any memory is taken for the spec."""
    floats = _FLOATS.get(spec.bits, (torch.int8 if spec.bits == 8 else torch.uint8,))
    _check_tensor(COEFFICIENTS, stored, floats, (stored.numel(),), where)
    wanted = -(-spec.count * spec.bits // 8) if spec.bits in (4, 3, 2) else spec.count
    if stored.numel() != wanted:
        raise _wrong_count(spec, f"a tensor of {wanted}", stored.numel(), where)


def _check_parts(adapter: PackedAdapter, where: str) -> None:
    """Everything of which a wrong value would be an adapter that no writer meant."""
    spec, coefficients = adapter.spec, adapter.coefficients
    _check_count(spec, coefficients, where)
    coded = spec.bits in CODED
    _check_tensor(COEFFICIENTS, coefficients, (torch.int8,) if coded else _FLOATS[spec.bits], (spec.count,), where)
    scaled, streamed = adapter.scales is not None, adapter.streams is not None
    if (scaled, streamed, tuple(sorted(adapter.extra))) != (coded, not spec.method.shares_basis, spec.extra):
        raise ExtraTensorError(
            f"{where}: there must be scales where coefficients are codes, streams where no basis is shared, and the "
            f"extra tensors that the spec names, got {spec.bits} bits with scales {scaled}, "
            f"share_basis={spec.method.shares_basis} with streams {streamed}, and "
            f"{len(adapter.extra)} extra tensors for {len(spec.extra)} names; pack the adapter again"
        )
    if adapter.scales is not None:
        _check_tensor(SCALES, adapter.scales, (torch.float32,), (spec.run_count,), where)
        check_codes(coefficients, spec.bits, where)
        if bool((adapter.scales < 0).any()):
            raise CoefficientValueError(f"{where}: scales must not be negative, got one; pack the adapter again")
    if adapter.streams is not None:
        shape = (spec.size, len(spec.method.roles))
        _check_tensor(STREAMS, adapter.streams, (torch.int64,), shape, where)
    _check_finite(adapter.values(), where)


def _check_tensor(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], where: str
) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        raise CoefficientTensorError(
            f"{where}: {name} must be {' or '.join(str(d) for d in dtypes)} of shape {list(shape)} by the spec, got "
            f"{tensor.dtype} of shape {list(tensor.shape)}; pack the adapter again"
        )


def _check_count(spec: Spec, values: Tensor, where: str) -> None:
    if values.numel() != spec.count:
        raise _wrong_count(spec, str(spec.count), values.numel(), where)


def _wrong_count(spec: Spec, wanted: str, found: int, where: str) -> CoefficientCountError:
    return CoefficientCountError(
        f"{where}: {spec.size} matrices of {spec.method.name} with these options have {spec.count} coefficients, "
        f"{wanted} at {spec.bits} bits, got {found}; spec and coefficients do not belong together: pack again"
    )


def _check_finite(values: Tensor, where: str) -> None:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0])
        raise CoefficientValueError(
            f"{where}: coefficients must be finite, got {float(values[index])} at index {index}; "
            "the training diverged or the file is damaged: use an earlier checkpoint"
        )


def _digests(tensors: Mapping[str, Tensor]) -> tuple[str, str | None]:
    rest = [tensor_bytes(tensors[name]) for name in data_order(tensors) if name != COEFFICIENTS]
    return sha256(tensor_bytes(tensors[COEFFICIENTS])), sha256(*rest) if rest else None


def _check_digests(spec: Spec, said: Digests, tensors: Mapping[str, Tensor], where: str) -> None:
    coefficients, rest = _digests(tensors)
    for what, wanted, found in (
        ("coefficients", said.coefficients, coefficients),
        ("other tensors", said.rest, rest),
        ("list of layers (the base fingerprint)", said.fingerprint, spec.fingerprint),
    ):
        if wanted != found:
            raise _altered(where, what, wanted, found)


def _altered(where: str, what: str, wanted: str | None, found: str | None) -> DigestError:
    return DigestError(
        f"{where}: the {what} must have the digest {wanted}, got {found}; the file was damaged or changed: "
        "take it from its source again"
    )
