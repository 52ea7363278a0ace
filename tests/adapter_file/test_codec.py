"""Codes as bytes against big integers."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from randbasis.adapter_file.codec import pack_codes, unpack_codes
from randbasis.errors import CodeError


@given(
    bits=st.sampled_from((2, 3, 4)),
    data=st.data(),
)
def test_bits_against_a_big_integer(bits: int, data: st.DataObject):
    codes = data.draw(st.lists(st.integers(-(1 << bits - 1), (1 << bits - 1) - 1), min_size=1, max_size=50))
    packed = pack_codes(np.array(codes, np.int8), bits)
    whole = sum((code & (1 << bits) - 1) << index * bits for index, code in enumerate(codes))
    assert packed == whole.to_bytes(-(-len(codes) * bits // 8), "little")
    assert unpack_codes(packed, len(codes), bits, "x").tolist() == codes


def test_a_bit_after_the_last_code_is_refused():
    packed = bytearray(pack_codes(np.array([1, -1, 0], np.int8), 3))
    packed[-1] |= 0x80
    with pytest.raises(CodeError, match="after the last of 3 codes"):
        unpack_codes(packed, 3, 3, "x")
