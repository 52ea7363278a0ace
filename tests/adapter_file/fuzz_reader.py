"""Coverage-guided fuzzing of the reader: `python fuzz_reader.py CORPUS [options of libFuzzer]`, or `make fuzz`.

The first byte of an input says what the rest is: a whole file; a spec, which is then sealed in a good file with right
digests, so that the checks behind the digests are reached; or a header before good data. Whatever it is, the reader
must refuse it with an error of this package, or read an adapter whose bytes read as the same adapter again.
"""

import json
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["randbasis.adapter_file"]):
    from randbasis.adapter_file import PackedAdapter

from malformed_files import CODED, FILES, GOOD, join, seal, split
from packed_cases import CASES, content

from randbasis.errors import RandbasisError

WHOLE, SPEC, HEADER = 0, 1, 2


def write_seeds(folder: Path) -> None:
    """Good and bad files, and the specs and headers of the good ones, as inputs to start from."""
    files = {name: adapter.to_bytes() for name, adapter in CASES.items()}
    inputs = {f"bad-{name}": bytes([WHOLE]) + data for name, (data, _) in FILES.items()}
    for name, data in files.items():
        header, spec, _ = split(data)
        inputs |= {
            f"good-{name}": bytes([WHOLE]) + data,
            f"spec-{name}": bytes([SPEC]) + json.dumps(spec).encode(),
            f"header-{name}": bytes([HEADER]) + json.dumps(header).encode(),
        }
    for name, data in inputs.items():
        (folder / name).write_bytes(data)


def as_file(data: bytes) -> bytes:
    """The file that an input stands for."""
    kind, rest = (data[0] % 4, data[1:]) if data else (WHOLE, b"")
    if kind == HEADER:
        return join(rest, split(GOOD)[2])
    if kind == SPEC:
        text = rest.decode(errors="replace")
        header, _, tensors = split(CODED if '"group"' in text or "digest_rest" in text else GOOD)
        try:
            spec = json.loads(text)
        except (ValueError, RecursionError):
            spec = text
        return seal(header, spec if isinstance(spec, dict) else text, tensors)
    return rest


def one_input(data: bytes) -> None:
    """What libFuzzer calls: any other exception than ours is a finding."""
    try:
        adapter = PackedAdapter.from_bytes(as_file(data))
    except RandbasisError:
        return
    written = adapter.to_bytes()
    again = PackedAdapter.from_bytes(written)
    assert content(again) == content(adapter)
    assert again.to_bytes() == written
    assert adapter.values().numel() == adapter.spec.count == sum(one.count for one, _ in adapter.matrices())


def main() -> None:
    """Add the seeds to the corpus and go on from there."""
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    write_seeds(corpus)
    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[2:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
