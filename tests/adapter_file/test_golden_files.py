"""The bytes of the format, written out: a change of any of them is a new version of the format."""

import json
import struct

import pytest
import safetensors.torch
import torch
from packed_cases import CASES, adapter_of, content

from randbasis.adapter_file import PackedAdapter, SpecMatrix
from randbasis.errors import RandbasisError
from randbasis.methods import Nola

METHOD = Nola(r=2, num_basis=2, alpha=8.0, seed=7)
VALUES = torch.tensor([0.5, -7.0, 1.0, 3.5, 0.0, 0.0, -1.75, 0.25])
ADAPTED = [SpecMatrix(f"layers.{layer}.q_proj", "", 0, 4, 4, 4, METHOD) for layer in (0, 1)]

SPEC = (
    rb"{\"base\":{\"architecture\":\"llama\",\"fingerprint\":"
    rb"\"438d688c17b375ee1bd01025f8e2153f6c89e8f06ae12f886fff1eef8df7e9fa\",\"name\":\"acme/tiny-llama\"},"
    rb"\"bits\":@BITS@,\"digest\":\"@DIGEST@\",@REST@\"law\":\"sign\","
    rb"\"matrices\":[{\"in\":4,\"layers\":[\"0-1\"],\"name\":\"layers.*.q_proj\",\"out\":4}],\"method\":\"nola\","
    rb"\"options\":{\"alpha\":8,\"num_basis\":2,\"num_basis_b\":null,\"parametrization\":\"offset\",\"r\":2,"
    rb"\"share_basis\":true},\"seed\":7}"
)
SIXTEEN = (
    b"\xc8\x02\0\0\0\0\0\0"
    b'{"__metadata__":{"format":"randbasis",'
    b'"sha256":"78babce55c0a660fff43c61bd9515e24e6b93984c9fa40f6f0bd3567864fdd2e","spec":"'
    + SPEC.replace(b"@BITS@", b"16")
    .replace(b"@DIGEST@", b"6939685da89245f4b514cc13f296dc1921754c05a581f0d54b44664126fc1631")
    .replace(b"@REST@", b"")
    + b'","version":"1"},"coefficients":{"dtype":"F16","shape":[8],"data_offsets":[0,16]}}      '
    b"\x00\x38\x00\xc7\x00\x3c\x00\x43\x00\x00\x00\x00\x00\xbf\x00\x34"  # 0.5 -7 1 3.5 0 0 -1.75 0.25
)
FOUR = (
    b"\x58\x03\0\0\0\0\0\0"
    b'{"__metadata__":{"format":"randbasis",'
    b'"sha256":"b10f67bede9808aa5406207519defa6fa040f838a594fe67a3d1d1f216ebff2c","spec":"'
    + SPEC.replace(b"@BITS@", b"4")
    .replace(b"@DIGEST@", b"b0fe5191820cfc0a3f3b0c805f79c629b47c4222301266892260d77d2f98ceb6")
    .replace(b"@REST@", rb"\"digest_rest\":\"39ea54d93bca840849a2e97b7d3a8973f9632766986126e2e689d6a32d56222d\",")
    + b'","version":"1"},"scales":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
    b'"coefficients":{"dtype":"U8","shape":[4],"data_offsets":[16,20]}}       '
    b"\x00\x00\x80\x3f\x00\x00\x00\x3f\x00\x00\x00\x00\x00\x00\x80\x3e"  # 1 0.5 0 0.25
    b"\x90\x72\x00\x19"  # 0 -7 | 2 7 | 0 0 | -7 1: the first code of a byte in its low half
)


def test_golden_bytes_at_16_bits():
    assert adapter_of(METHOD, 16, values=VALUES, adapted=ADAPTED).to_bytes() == SIXTEEN
    assert torch.equal(PackedAdapter.from_bytes(SIXTEEN).values(), VALUES.half())


def test_a_task_is_one_key_of_the_spec_and_no_other_byte():
    """The text is written out; a reader keeps what it does not know of a task."""
    task = {"task": "sequence-classification", "labels": ["no", "süß"], "later": {"than": [1.5, None]}}
    data = adapter_of(METHOD, 16, values=VALUES, adapted=ADAPTED, task=task).to_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    spec = json.loads(data[8 : 8 + length])["__metadata__"]["spec"]
    told = '"seed":7,"task":{"labels":["no","süß"],"later":{"than":[1.5,null]},"task":"sequence-classification"}}'
    plain = SPEC.replace(b"@BITS@", b"16").replace(b"@REST@", b"").replace(b"\\", b"").decode()
    digest = json.loads(spec)["digest"]
    assert spec == plain.replace("@DIGEST@", digest).replace('"seed":7}', told)
    assert PackedAdapter.from_bytes(data).spec.task == task
    assert PackedAdapter.from_bytes(data).at(4).spec.task == task
    assert PackedAdapter.from_bytes(data).to_bytes() == data


def test_golden_bytes_at_4_bits():
    assert adapter_of(METHOD, 4, values=VALUES, adapted=ADAPTED).to_bytes() == FOUR
    expected = torch.tensor([0.0, -7.0, 1.0, 3.5, 0.0, 0.0, -1.75, 0.25])
    assert torch.equal(PackedAdapter.from_bytes(FOUR).values(), expected)


def test_the_order_of_the_matrices_given_does_not_matter():
    assert adapter_of(METHOD, 16, values=VALUES, adapted=ADAPTED[::-1]).to_bytes() == SIXTEEN


@pytest.mark.parametrize("name", CASES)
def test_against_the_safetensors_package(name: str):
    found = safetensors.torch.load(CASES[name].to_bytes())
    adapter = CASES[name]
    expected = {f"extra.{key}": tensor for key, tensor in adapter.extra.items()}
    assert found.keys() - expected.keys() <= {"coefficients", "scales", "streams"}
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)
    if adapter.spec.bits >= 8:
        assert torch.equal(found["coefficients"], adapter.coefficients)


@pytest.mark.parametrize("name", CASES)
def test_numbers_stand_at_multiples_of_their_width(name: str):
    data = CASES[name].to_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    starts = {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}
    widths = {key: tensor.element_size() for key, tensor in safetensors.torch.load(data).items()}
    assert [key for key, start in starts.items() if start % widths[key]] == []


def test_a_file_that_another_tool_wrote_again_is_read():
    header_length = struct.unpack("<Q", FOUR[:8])[0]
    header, data = json.loads(FOUR[8 : 8 + header_length]), FOUR[8 + header_length :]
    text = json.dumps(dict(reversed(header.items())), indent=1).encode()
    again = PackedAdapter.from_bytes(struct.pack("<Q", len(text)) + text + data)
    assert again.to_bytes() == FOUR


def test_every_changed_bit_is_refused_or_means_nothing():
    """A flip in the padding can make another JSON space of a space; nothing else passes."""
    expected = content(PackedAdapter.from_bytes(FOUR))
    passed = []
    for position in range(8 * len(FOUR)):
        changed = bytearray(FOUR)
        changed[position // 8] ^= 1 << position % 8
        try:
            found = PackedAdapter.from_bytes(bytes(changed))
        except RandbasisError:
            continue
        assert content(found) == expected
        passed.append(chr(changed[position // 8]))
    assert set(passed) <= set("\t\n\r ")


def test_every_shorter_file_is_refused():
    for length in range(len(FOUR)):
        with pytest.raises(RandbasisError):
            PackedAdapter.from_bytes(FOUR[:length])
