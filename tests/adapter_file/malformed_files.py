"""Files that a reader must refuse, and the class of error for each: `python malformed_files.py` writes the folder.

Each is a good file with one thing wrong. Where the digests would hide what is meant, the file is sealed again with
right ones, as an attacker would do.
"""

import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from packed_cases import METHODS, TASK, adapter_of, heads

from randbasis import errors

FOLDER = Path(__file__).parent / "malformed"

GOOD = adapter_of(METHODS["nola"], 16).to_bytes()
CODED = adapter_of(METHODS["nola"], 4).to_bytes()
ODD = adapter_of(METHODS["pranc"], 3).to_bytes()  # 25 codes of 3 bits leave 5 bits over
OWN = adapter_of(METHODS["nola-own-basis"], 32).to_bytes()
TASKED = adapter_of(METHODS["nola"], 16, task=TASK).to_bytes()
HEADS = adapter_of(METHODS["vera"], 16, extra=heads()).to_bytes()

Change = Callable[[dict[str, Any]], object]


def split(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, spec and data section of a good file."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["spec"]), data[8 + length :]


def join(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def seal(header: dict[str, Any], spec: Any, data: bytes) -> bytes:
    """Put a spec into a header with right digests of everything that can be found."""
    if isinstance(spec, dict):
        spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        pieces = {name: data[start:stop] for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1])}
        if "digest" in spec and "coefficients" in pieces:
            spec["digest"] = hashlib.sha256(pieces.pop("coefficients")).hexdigest()
        if "digest_rest" in spec:
            spec["digest_rest"] = hashlib.sha256(b"".join(pieces.values())).hexdigest()
    text = spec if isinstance(spec, str) else json.dumps(spec, sort_keys=True, separators=(",", ":"))
    header["__metadata__"] |= {"spec": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return join(header, data)


def with_spec(change: Change, good: bytes = GOOD) -> bytes:
    header, spec, data = split(good)
    change(spec)
    return seal(header, spec, data)


def with_text(spec: str) -> bytes:
    header, _, data = split(GOOD)
    return seal(header, spec, data)


def with_header(change: Change, good: bytes = GOOD) -> bytes:
    header, _, data = split(good)
    change(header)
    return join(header, data)


def with_metadata(change: Change) -> bytes:
    return with_header(lambda header: change(header["__metadata__"]))


def with_data(position: int, content: bytes, good: bytes = GOOD) -> bytes:
    header, spec, data = split(good)
    changed = bytearray(data)
    changed[position : position + len(content)] = content
    return seal(header, spec, bytes(changed))


def with_tensor(old: str, new: str, good: bytes = GOOD) -> bytes:
    header, spec, data = split(good)
    header[new] = header.pop(old)
    return seal(header, spec, data)


def put(key: str, value: Any) -> Change:
    return lambda spec: spec.__setitem__(key, value)


def into(key: str, inner: str, value: Any) -> Change:
    return lambda spec: spec[key].__setitem__(inner, value)


def in_first(key: str, value: Any) -> Change:
    return lambda spec: spec["matrices"][0].__setitem__(key, value)


def drop(key: str) -> Change:
    return lambda spec: spec.pop(key)


def torch_zip() -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pickle.dumps({"a": 1}, protocol=2))
    return file.getvalue()


def first_cell(span: str, change: list[int]) -> bytes:
    return with_header(lambda header: header["coefficients"].__setitem__(span, change))


NESTED = b"[" * 5000 + b"]" * 5000

FILES: dict[str, tuple[bytes, type[errors.RandbasisError]]] = {
    # --- length ---
    "empty": (b"", errors.TruncatedFileError),
    "seven-bytes": (GOOD[:7], errors.TruncatedFileError),
    "one-byte-short": (GOOD[:-1], errors.TruncatedFileError),
    "data-missing": (GOOD[: len(GOOD) - len(split(GOOD)[2])], errors.TruncatedFileError),
    "one-byte-long": (GOOD + b"\0", errors.TruncatedFileError),
    "another-file-behind": (GOOD + GOOD, errors.TruncatedFileError),
    "cut-in-the-header": (GOOD[:400], errors.HeaderSizeError),
    "header-longer-than-limit": (struct.pack("<Q", (16 << 20) + 1) + GOOD[8:], errors.HeaderSizeError),
    "header-longer-than-anything": (b"\xff" * 8 + GOOD[8:], errors.HeaderSizeError),
    "pickle": (pickle.dumps({"coefficients": [1.0]}, protocol=4), errors.HeaderSizeError),
    "torch-zip": (torch_zip(), errors.HeaderSizeError),
    # --- header ---
    "header-empty": (join(b"", b""), errors.HeaderError),
    "header-not-json": (join(b"{'a': 1}", b""), errors.HeaderError),
    "header-not-utf8": (join(b'{"\xff": 1}', b""), errors.HeaderError),
    "header-a-list": (join(b"[]", b""), errors.HeaderError),
    "header-nested": (join(b'{"a":' + NESTED + b"}", b""), errors.HeaderError),
    "header-key-twice": (
        join(json.dumps(split(GOOD)[0]).encode()[:-1] + b',"__metadata__":{}}', split(GOOD)[2]), errors.HeaderError
    ),
    "metadata-not-text": (with_metadata(put("version", 1)), errors.HeaderError),
    "metadata-a-list": (with_header(put("__metadata__", [])), errors.HeaderError),
    "entry-not-an-object": (with_header(put("coefficients", 5)), errors.HeaderError),
    "entry-key-too-many": (with_header(into("coefficients", "stride", [1])), errors.HeaderError),
    "dtype-unknown": (with_header(into("coefficients", "dtype", "F7")), errors.HeaderError),
    "dtype-of-other-width": (with_header(into("coefficients", "dtype", "F32")), errors.HeaderError),
    "offsets-with-a-hole": (first_cell("data_offsets", [2, 114]), errors.HeaderError),
    "offsets-backwards": (first_cell("data_offsets", [112, 0]), errors.HeaderError),
    "offsets-true": (first_cell("data_offsets", [False, 112]), errors.HeaderError),
    "offsets-beyond-64-bits": (first_cell("data_offsets", [1 << 64, (1 << 64) + 112]), errors.HeaderError),
    "shape-negative": (first_cell("shape", [-1, -56]), errors.HeaderError),
    "shape-overflow": (first_cell("shape", [0, 1 << 62, 1 << 62]), errors.HeaderError),
    "overlapping-tensors": (
        with_header(put("extra.a", {"dtype": "F16", "shape": [56], "data_offsets": [0, 112]})),
        errors.HeaderError,
    ),
    "bool-of-two": (with_data(split(HEADS)[0]["extra.base_model.model.mask"]["data_offsets"][0], b"\2", HEADS),
                    errors.HeaderError),
    # --- metadata and spec ---
    "not-packed": (with_metadata(put("format", "pt")), errors.NotPackedError),
    "no-metadata": (with_header(drop("__metadata__")), errors.NotPackedError),
    "version-2-of-nothing-shared": (with_metadata(put("version", "2")), errors.DigestError),
    "version-3": (with_metadata(put("version", "3")), errors.FormatVersionError),
    "no-version": (with_metadata(drop("version")), errors.FormatVersionError),
    "no-spec": (with_metadata(drop("spec")), errors.SpecKeyError),
    "no-seal": (with_metadata(drop("sha256")), errors.SpecKeyError),
    "seed-changed": (GOOD.replace(rb"\"seed\":1844", rb"\"seed\":1744"), errors.DigestError),
    "coefficient-changed": (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), errors.DigestError),
    "scale-changed": (CODED[:-40] + bytes([CODED[-40] ^ 1]) + CODED[-39:], errors.DigestError),
    "head-changed": (HEADS.replace(b"\1\0\1", b"\1\1\1"), errors.DigestError),
    "fingerprint-of-another-base": (with_spec(into("base", "fingerprint", "0" * 64)), errors.DigestError),
    "spec-not-json": (with_text("{"), errors.SpecSyntaxError),
    "spec-a-list": (with_text("[]"), errors.SpecSyntaxError),
    "spec-nan": (with_text('{"seed":NaN}'), errors.SpecSyntaxError),
    "spec-infinite": (with_text('{"seed":1e999}'), errors.SpecSyntaxError),
    "spec-half-a-character": (with_text('{"seed":"\\ud800"}'), errors.SpecSyntaxError),
    "spec-number-of-5000-digits": (with_text('{"seed":' + "9" * 5000 + "}"), errors.SpecSyntaxError),
    "spec-key-missing": (with_spec(drop("seed")), errors.SpecKeyError),
    "spec-key-unknown": (with_spec(put("adaptor", 1)), errors.SpecKeyError),
    "options-missing": (with_spec(lambda spec: spec["options"].pop("r")), errors.SpecKeyError),
    "option-unknown": (with_spec(into("options", "rank", 4)), errors.SpecKeyError),
    "matrix-key-missing": (with_spec(lambda spec: spec["matrices"][0].pop("in")), errors.SpecKeyError),
    "method-unknown": (with_spec(put("method", "lora")), errors.UnknownMethodError),
    "law-unknown": (with_spec(put("law", "gaussian")), errors.LawError),
    "law-out-of-range": (with_spec(put("law", "sparse(0.5)")), errors.LawError),
    "seed-of-65-bits": (with_spec(put("seed", 1 << 64)), errors.SpecValueError),
    "seed-negative": (with_spec(put("seed", -1)), errors.SpecValueError),
    "rank-zero": (with_spec(into("options", "r", 0)), errors.RankError),
    "rank-above-limit": (with_spec(into("options", "r", 1 << 20)), errors.RankError),
    "rank-true": (with_spec(into("options", "r", True)), errors.SpecValueError),
    "alpha-text": (with_spec(into("options", "alpha", "8")), errors.SpecValueError),
    "parametrization-unknown": (with_spec(into("options", "parametrization", "x")), errors.SpecValueError),
    "bits-5": (with_spec(put("bits", 5)), errors.PrecisionError),
    "group-with-floats": (with_spec(put("group", 64)), errors.PrecisionError),
    "bits-of-another-dtype": (with_spec(put("bits", 32)), errors.CoefficientTensorError),
    "matrices-none": (with_spec(put("matrices", [])), errors.SpecValueError),
    "matrices-a-number": (with_spec(put("matrices", 5)), errors.SpecValueError),
    "matrix-a-number": (with_spec(put("matrices", [5])), errors.SpecValueError),
    "matrix-without-rows": (with_spec(in_first("out", 0)), errors.SpecValueError),
    "matrix-wider-than-the-counters": (with_spec(in_first("in", 1 << 33)), errors.SpecValueError),
    "matrix-twice": (with_spec(lambda spec: put(1, spec["matrices"][0])(spec["matrices"])), errors.SpecValueError),
    "parts-overlap": (with_spec(in_first("rows", [6, 10])), errors.SpecValueError),
    "rows-outside": (with_spec(in_first("rows", [8, 13])), errors.SpecValueError),
    "part-unnamed": (with_spec(in_first("part", "")), errors.SpecValueError),
    "layers-of-a-billion": (with_spec(in_first("layers", ["0-999999999"])), errors.SpecValueError),
    "layers-backwards": (with_spec(in_first("layers", ["3-1"])), errors.SpecValueError),
    "layers-too-many": (with_spec(in_first("layers", ["0-1", "0-1"])), errors.SpecValueError),
    "layers-missing": (with_spec(lambda spec: spec["matrices"][0].pop("layers")), errors.SpecValueError),
    "path-with-an-empty-name": (with_spec(in_first("name", "a..b")), errors.SpecValueError),
    "digest-not-hexadecimal": (with_text(json.dumps(split(GOOD)[1] | {"digest": "x"})), errors.SpecValueError),
    # --- names ---
    "matrix-absolute": (with_spec(in_first("name", "/etc/*/passwd")), errors.UnsafeNameError),
    "matrix-climbs": (with_spec(in_first("name", "a/../../b.*")), errors.UnsafeNameError),
    "base-absolute": (with_spec(into("base", "name", "/home/me/model")), errors.UnsafeNameError),
    "base-climbs": (with_spec(into("base", "name", "..\\model")), errors.UnsafeNameError),
    "base-drive": (with_spec(into("base", "name", "C:\\model")), errors.UnsafeNameError),
    "extra-absolute": (with_spec(put("extra", ["/tmp/a"])), errors.UnsafeNameError),
    "tensor-climbs": (with_tensor("coefficients", "../coefficients"), errors.UnsafeNameError),
    # --- tensors ---
    "task-a-text": (with_spec(put("task", "causal-lm")), errors.SpecValueError),
    "task-without-name": (with_spec(lambda spec: spec["task"].pop("task"), TASKED), errors.SpecKeyError),
    "task-of-one-label": (with_spec(into("task", "labels", ["no"]), TASKED), errors.SpecValueError),
    "task-label-twice": (with_spec(into("task", "labels", ["no", "no"]), TASKED), errors.SpecValueError),
    "task-columns-a-list": (with_spec(into("task", "columns", ["a", "y"]), TASKED), errors.SpecValueError),
    "task-column-a-number": (with_spec(into("task", "columns", {"text": 0}), TASKED), errors.SpecValueError),
    "task-length-zero": (with_spec(into("task", "max_length", 0), TASKED), errors.SpecValueError),
    "task-length-true": (with_spec(into("task", "max_length", True), TASKED), errors.SpecValueError),
    "task-pooling-a-number": (with_spec(into("task", "pooling", 1), TASKED), errors.SpecValueError),
    "task-image-of-no-size": (with_spec(into("task", "image_size", 0), TASKED), errors.SpecValueError),
    "task-separator-null": (with_spec(into("task", "separator", None), TASKED), errors.SpecValueError),
    "task-template-a-list": (with_spec(into("task", "prompt_template", ["a"]), TASKED), errors.SpecValueError),
    "task-end-negative": (with_spec(into("task", "end_id", -1), TASKED), errors.SpecValueError),
    "task-answer-of-a-fraction": (with_spec(into("task", "answer_length", 1.5), TASKED), errors.SpecValueError),
    "coefficients-missing": (with_tensor("coefficients", "coefficient"), errors.ExtraTensorError),
    "extra-unnamed": (with_spec(lambda spec: spec["extra"].pop(), HEADS), errors.ExtraTensorError),
    "extra-missing": (with_spec(put("extra", ["a"])), errors.ExtraTensorError),
    "extra-unsorted": (with_spec(lambda spec: spec["extra"].reverse(), HEADS), errors.SpecValueError),
    "scales-missing": (with_tensor("scales", "extra.scales", CODED), errors.ExtraTensorError),
    "streams-missing": (with_spec(into("options", "share_basis", True), OWN), errors.ExtraTensorError),
    "coefficients-too-many": (with_spec(into("options", "num_basis", 4)), errors.CoefficientCountError),
    "coefficients-too-few": (with_spec(into("options", "num_basis", 6)), errors.CoefficientCountError),
    "coefficients-too-few-codes": (with_spec(into("options", "num_basis", 9), CODED), errors.CoefficientCountError),
    "scales-too-few": (with_spec(put("group", 2), CODED), errors.CoefficientTensorError),
    "coefficients-nan": (with_data(0, b"\x00\x7e"), errors.CoefficientValueError),
    "coefficients-infinite": (with_data(4, b"\x00\x7c"), errors.CoefficientValueError),
    "scale-nan": (with_data(0, struct.pack("<f", float("nan")), CODED), errors.CoefficientValueError),
    "scale-infinite": (with_data(0, struct.pack("<f", float("inf")), CODED), errors.CoefficientValueError),
    "scale-negative": (with_data(0, struct.pack("<f", -1.0), CODED), errors.CoefficientValueError),
    "scale-overflows": (with_data(0, struct.pack("<f", 3e38), CODED), errors.CoefficientValueError),
    "code-minus-eight": (with_data(14 * 4, b"\x88", CODED), errors.CodeError),
    "bits-after-the-last-code": (with_data(len(split(ODD)[2]) - 1, b"\xff", ODD), errors.CodeError),
}  # fmt: skip


def write_folder() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (data, _) in FILES.items():
        (FOLDER / f"{name}.safetensors").write_bytes(data)


if __name__ == "__main__":
    write_folder()
