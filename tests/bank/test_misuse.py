"""What would give a row the adapter of another one: leases that ended, plans inside plans, layers that see no rows."""

from pathlib import Path

import pytest
import torch
import transformers
from support.tuner_cases import Case, make_config, outputs, seeded, token_batch
from test_bank import alone, packed
from test_models import trained
from torch import Tensor, nn

from randbasis import put
from randbasis.adapter_file import PackedAdapter
from randbasis.bank import AdapterBank
from randbasis.bank.bank import Form
from randbasis.errors import BankError, NotResidentError

LLAMA = Case("linear", "nola")


@pytest.fixture
def users(tmp_path: Path) -> list[PackedAdapter]:
    return [packed(LLAMA, tmp_path, seed) for seed in (1, 2, 3)]


def bank_of(users: list[PackedAdapter], form: Form = "auto") -> AdapterBank:
    bank = AdapterBank(LLAMA.base(), form=form)
    for at, user in enumerate(users):
        bank.load(f"u{at}", user)
    return bank


def test_a_lease_that_was_released_is_not_the_row_that_came_after(users: list[PackedAdapter]) -> None:
    bank = bank_of(users[:1])
    lease = bank.lease("u0")
    lease.release()
    bank.unload("u0")
    bank.load("other", users[1])
    with pytest.raises(NotResidentError, match="not released"), bank.rows([lease]):
        pass
    with pytest.raises(NotResidentError, match="not released"), bank.tokens([(lease, 3)]):
        pass


def test_a_lease_of_another_bank_is_none(users: list[PackedAdapter]) -> None:
    bank, other = bank_of(users[:1]), bank_of(users[:1])
    with other.lease("u0") as lease, pytest.raises(NotResidentError, match="of this bank"), bank.rows([lease]):
        pass


def test_a_lease_that_ends_within_its_block_keeps_the_row(users: list[PackedAdapter]) -> None:
    bank = bank_of(users[:1])
    lease = bank.lease("u0")
    with bank.rows([lease] * 3):
        lease.release()
        bank.unload("u0")
        slot = lease.resident.slot
        assert bank.load("other", users[1]).slot != slot
        found = outputs(bank.model, token_batch(3))
    torch.testing.assert_close(found, alone(LLAMA, users[0], token_batch(3)), rtol=1e-4, atol=1e-5)
    assert bank.load("third", users[2]).slot == slot


@pytest.mark.parametrize("form", ["coefficients", "factors"])
def test_a_packed_batch_within_another_leaves_it_as_it_was(form: Form, users: list[PackedAdapter]) -> None:
    bank = bank_of(users, form)
    layer, x = bank.model.get_submodule("model.layers.0.self_attn.q_proj"), torch.randn(1, 3, 32)
    runs, others = [("u0", 1), ("u1", 1), ("u2", 1)], [("u2", 1), ("u2", 1), ("u0", 1)]
    with bank.tokens(runs):
        expected = layer(x)
    with bank.tokens(runs) as plan:
        with bank.tokens(others):
            assert not torch.allclose(layer(x), expected, atol=1e-3)
        assert torch.equal(layer(x), expected)
    with pytest.raises(BankError, match="not held"), bank.using(plan):
        pass
    with pytest.raises(BankError, match="0 tokens or more"), bank.tokens([("u0", 4), ("u1", -1)]):
        pass


@pytest.mark.parametrize("form", ["coefficients", "factors", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_moved_to_another_dtype(dtype: torch.dtype, form: Form, users: list[PackedAdapter]) -> None:
    bank, names, batch = bank_of(users, form), ["u0", "__base__", "u1"], token_batch(3)
    before = outputs(bank.model, batch, adapter_names=names)
    bank.model.to(dtype)
    found = outputs(bank.model, batch, adapter_names=names)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), before, rtol=0.05, atol=0.01)


def test_a_closed_bank_takes_nothing(users: list[PackedAdapter]) -> None:
    bank = bank_of(users[:1])
    bank.close()
    with pytest.raises(BankError, match="closed"):
        bank.load("a", users[0])


class Attending(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def test_as_many_tokens_as_rows_where_tokens_come_first(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="batch_first=True"):
        AdapterBank(seeded(Attending, False))
    users = [
        trained(seeded(Attending, True), make_config("nola", ["linear1", "linear2"]), tmp_path, seed) for seed in (1, 2)
    ]
    base, x = seeded(Attending, True), {"x": torch.randn(4, 4, 24, generator=torch.Generator().manual_seed(0))}
    bank = AdapterBank(base)
    for at, user in enumerate(users):
        bank.load(f"u{at}", user)
    found = outputs(base, x, adapter_names=["u0", "u1", "u0", "__base__"])
    for row, user in enumerate((users[0], users[1], users[0])):
        expected = outputs(put(seeded(Attending, True), user), x)[row]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[3], outputs(base, x)[3])


def test_experts_that_see_some_of_the_tokens(tmp_path: Path) -> None:
    """As many tokens at one expert as the batch has rows would pass for its rows."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    build = transformers.SwitchTransformersForConditionalGeneration
    bank = AdapterBank(seeded(build, config))
    with pytest.raises(BankError, match="one expert of several"):
        bank.load("a", trained(seeded(build, config), make_config("vera", ["wi"]), tmp_path, 1))
    bank.load("b", trained(seeded(build, config), make_config("vera", ["q"]), tmp_path, 2))
