"""Groups of matrices by their paths, against lists written by hand."""

import pytest

from randbasis.errors import TieError
from randbasis.ties import check_tie, group_of, owners

PATHS = [
    *(f"model.layers.{layer}.{name}" for layer in range(5) for name in ("self_attn.q_proj", "mlp.experts.7.up_proj")),
    "lm_head",
    "classifier",
]


@pytest.mark.parametrize("tie", ["matrix", "model", "block:1", "block:12"])
def test_what_may_be_asked_for(tie):
    assert check_tie(tie) == tie


@pytest.mark.parametrize(
    "tie", ["", "Model", "block", "block:", "block:0", "block:01", "block:-1", "block:1.5", None, 3]
)
def test_what_may_not(tie):
    with pytest.raises(TieError, match="'block:N'"):
        check_tie(tie)


def test_blocks_of_a_model():
    assert owners(PATHS, "model") == [0] * 12
    assert owners(PATHS, "block:1") == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10]
    assert owners(PATHS, "block:2") == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 10, 10]
    assert owners(PATHS, "block:100") == [0] * 10 + [10, 10]


def test_an_encoder_and_a_decoder_are_apart():
    paths = ["encoder.block.0.layer.0.q", "encoder.block.1.layer.1.wi", "decoder.block.0.layer.0.q"]
    assert owners(paths, "block:2") == [0, 0, 2]
    assert owners(paths, "model") == [0, 0, 0]


def test_a_sequence_of_layers_is_a_list_of_blocks():
    assert [group_of(path, "block:2") for path in ("0", "1", "2", "heads.0")] == [".0", ".0", ".1", "heads.0"]


def test_a_path_is_its_own_group_where_nothing_is_shared():
    assert {group_of(path, "matrix") for path in PATHS} == set(PATHS)
