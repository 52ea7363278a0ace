"""A packed adapter: spec and numbers together, to bytes and back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from randbasis.adapter_file import container
from randbasis.adapter_file.container import RawTensor
from randbasis.adapter_file.contents import (
    COEFFICIENTS,
    DIVERGED,
    EXTRA,
    SCALES,
    STREAMS,
    Contents,
    check_count,
    not_finite,
)
from randbasis.adapter_file.spec import Spec, SpecMatrix
from randbasis.basis import check_streams
from randbasis.codes import dequantize, narrowed, quantize
from randbasis.errors import CoefficientTensorError, CoefficientValueError, PrecisionError, StreamValueError
from randbasis.files.locations import Location
from randbasis.files.whole_file import write
from randbasis.methods import Delta
from randbasis.precision import CODED, check_precision, run_lengths
from randbasis.ties import UNTIED

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U32": torch.uint32,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name in the header of a file → dtype: what an adapter may hold."""
_KINDS = {32: (torch.float32,), 16: (torch.float16, torch.bfloat16)}
"""Bits → dtypes of coefficients; codes are int8."""
_LABELS = {dtype: label for label, dtype in DTYPES.items()}


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
        if not values.is_floating_point():
            raise PrecisionError(f"coefficients must be floating, got {values.dtype}; convert them to torch.float32")
        check_count(spec, values.numel(), "coefficients to pack")
        _check_finite(values, "coefficients to pack")
        extra = dict(sorted((extra or {}).items()))
        scales = None
        if spec.bits in CODED:
            values, scales = quantize(values, run_lengths(spec.vector_lengths, spec.group), spec.bits)
        elif values.dtype not in (torch.float16, torch.bfloat16):
            values = narrowed(values, torch.float32 if spec.bits == 32 else torch.float16)
        bits = spec.bits if scales is not None else 8 * values.element_size()
        by_path = spec.tie != UNTIED and streams is not None and _are_of_paths(spec, streams)
        return cls(replace(spec, bits=bits, extra=tuple(extra), path_streams=by_path), values, scales, streams, extra)

    def check(self, where: str) -> None:
        """Raise unless the numbers are those of the spec: what was read always is, what was made by hand may not be.

        Args:
            where: what it was read from, for messages.

        Raises:
            CoefficientCountError: there are more or fewer coefficients than the spec implies.
            CoefficientTensorError: coefficients, scales or streams have another shape, or are there or not against it.
            CoefficientValueError: a value is not finite.
            StreamValueError: streams are none.
        """
        spec, values = self.spec, self.coefficients
        if values.dtype not in (kinds := _KINDS.get(spec.bits, (torch.int8,))):
            raise CoefficientTensorError(
                f"{where}: {COEFFICIENTS} must be {' or '.join(map(str, kinds))} with {spec.bits} bits, got "
                f"{values.dtype}; make the adapter with PackedAdapter.of"
            )
        for name, tensor, shape in (
            (COEFFICIENTS, values, (spec.count,)),
            (SCALES, self.scales, (spec.run_count,) if spec.bits in CODED else None),
            (STREAMS, self.streams, spec.streams_shape),
        ):
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape:
                check_count(spec, values.numel(), where)
                raise CoefficientTensorError(
                    f"{where}: {name} must be {_of_shape(shape)} by the spec, got {_of_shape(found)}; make the adapter "
                    "with PackedAdapter.of"
                )
        if self.streams is not None:
            self._check_streams(self.streams, where)
        values = values if self.scales is None else self.values()
        if not bool(torch.isfinite(values).all()):
            _check_finite(values, where)
        for name, tensor in self.extra.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CoefficientValueError(f"{where}: {name!r} must be finite; {DIVERGED}")

    def _check_streams(self, streams: Tensor, where: str) -> None:
        check_streams(f"{where}: {STREAMS}", streams)
        if self.spec.path_streams and not _are_of_paths(self.spec, streams):
            raise StreamValueError(
                f"{where}: {STREAMS} must be those of the paths of the matrices where the spec says so (path_streams), "
                "got others; make the adapter with PackedAdapter.of"
            )

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
        streams = None if self.streams is None else cast("list[list[int]]", self.streams.tolist())
        values = self.values()
        for index, (one, start) in enumerate(zip(self.spec.matrices, self.spec.starts, strict=True)):
            bound = one.bind(None if streams is None else tuple(streams[index]))
            yield one, bound.delta(one.coefficients(values, start))

    # --- bytes ---

    def to_bytes(self) -> bytes:
        """The canonical bytes of the file.

        Raises:
            PackedFileError: the adapter is one that no reader would take.
            StreamValueError: its streams are none.
        """
        where = "the adapter to write"
        tensors = {COEFFICIENTS: self.coefficients, **{EXTRA + name: tensor for name, tensor in self.extra.items()}}
        if self.scales is not None:
            tensors[SCALES] = self.scales
        if self.streams is not None:
            self._check_streams(self.streams, where)
            if not self.spec.path_streams:
                tensors[STREAMS] = self.streams.to(torch.uint32)
        contents = Contents.of(self.spec, {name: _raw(tensor, name) for name, tensor in tensors.items()}, where)
        return contents.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "the packed adapter") -> "PackedAdapter":
        """Read the bytes of a file; see :func:`randbasis.adapter_file.read` for what is refused."""
        return cls.from_contents(Contents.from_bytes(data, where))

    @classmethod
    def from_contents(cls, contents: Contents) -> "PackedAdapter":
        """What a file holds, as tensors."""
        tensors = contents.tensors
        streams = _tensor(tensors[STREAMS]).to(torch.int64) if STREAMS in tensors else None
        if contents.spec.path_streams:
            streams = torch.tensor(contents.spec.streams_of_paths, dtype=torch.int64)
        return cls(
            contents.spec,
            _tensor(contents.coefficients),
            _tensor(tensors[SCALES]) if SCALES in tensors else None,
            streams,
            {name: _tensor(tensors[EXTRA + name]) for name in contents.spec.extra},
        )

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
    return PackedAdapter.from_contents(Contents.load(container.read(path)[0], str(path)))


def _are_of_paths(spec: Spec, streams: Tensor) -> bool:
    return [tuple(row) for row in cast("list[list[int]]", streams.tolist())] == spec.streams_of_paths


def _check_finite(values: Tensor, where: str) -> None:
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        index = int((~finite.reshape(-1)).nonzero()[0])
        raise not_finite(float(values.reshape(-1)[index]), index, where)


def _of_shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"a tensor of shape {list(shape)}"


def _raw(tensor: Tensor, name: str) -> RawTensor:
    if tensor.dtype not in _LABELS:
        raise PrecisionError(
            f"the dtype of tensor {name!r} must be one of {', '.join(DTYPES)}, got {tensor.dtype}; convert the tensor "
            "before packing"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return RawTensor(_LABELS[tensor.dtype], tuple(tensor.shape), data)


def _tensor(raw: RawTensor) -> Tensor:
    dtype = DTYPES[raw.dtype]
    if not raw.size:
        return torch.empty(raw.shape, dtype=dtype)
    data = raw.data if isinstance(raw.data, bytearray) else bytearray(raw.data)
    return torch.frombuffer(data, dtype=dtype).reshape(raw.shape)
