"""What fits into a budget: bytes against packed files, memory against what torch holds, the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from small_bases import config_folder, llama
from torch import nn
from typer.testing import CliRunner

from randbasis.adapters import budget as budgets
from randbasis.adapters.budget import Configuration, byte_count, config_lines, configurations
from randbasis.adapters.packed import pack_adapter
from randbasis.adapters.plan import adapted_base
from randbasis.cli import app
from randbasis.errors import BudgetError, TargetError
from randbasis.methods import RandLora
from randbasis.tuner import config_class
from randbasis.tuner.config import RandLoraConfig
from randbasis.tuner.layer import RandbasisLinear

WORDS = {"rank": "r", "basis": "num_basis"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(base: Path) -> list[Configuration]:
    return configurations(base, 4000, "all-linear")


def adapted(one: Configuration) -> Any:
    options = {WORDS.get(name, name): value for name, value in one.options.items()}
    config = config_class(one.method)(
        target_modules="all-linear", task_type="CAUSAL_LM", **options, **({"law": one.law} if one.law else {})
    )
    return get_peft_model(llama(), config)


@pytest.mark.parametrize(
    ("text", "count"),
    [("64", 64), (64, 64), ("512 B", 512), ("16KB", 16_000), ("16 KiB", 16_384), ("1.5MB", 1_500_000)],
)
def test_bytes_of_a_text(text: str, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "KB", "0", "-4KB", "16XB", "many", "1e3"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(BudgetError, match="budget must be bytes"):
        byte_count(text)


def test_all_fit_and_none_of_the_next_size_would(base: Path, found: list[Configuration]) -> None:
    assert {one.method for one in found} >= {"nola", "vera", "pranc", "loraxs"}
    assert {one.law for one in found if one.method == "nola"} == set(budgets.LAWS)
    assert {one.law for one in found if one.method == "vera"} == set(budgets.LAWS) - {"hashed"}
    assert all(one.bytes[one.bits] <= 4000 for one in found)

    def whole(listed: list[Configuration]) -> Configuration:
        return next(
            one
            for one in listed
            if (one.method, one.law, one.bits) == ("nola", "sign", 16) and "tie" not in one.options
        )

    nola = whole(found)
    larger = configurations(base, 4000 + 2 * 2 * 14, "all-linear")  # one coefficient more on either side
    wider = whole(larger)
    assert wider.options["basis"] > nola.options["basis"]


@pytest.mark.parametrize(
    ("method", "tie"),
    [("nola", None), ("nola", "model"), ("vera", None), ("randlora", None), ("pranc", None), ("pranc", "model"),
     ("loraxs", None)],
)  # fmt: skip
@pytest.mark.parametrize("bits", [32, 16, 4, 3])
def test_bytes_are_those_of_the_packed_file(
    base: Path, tmp_path: Path, method: str, tie: str | None, bits: int
) -> None:
    one = next(
        one
        for one in configurations(base, 30_000, "all-linear")
        if (one.method, one.options.get("tie"), one.bits) == (method, tie, bits)
    )
    model = adapted(one)
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(tmp_path / "adapter")
    for precision, size in one.bytes.items():
        file = tmp_path / f"{precision}.safetensors"
        pack_adapter(tmp_path / "adapter", file, bits=precision)
        assert file.stat().st_size == size, precision
    assert one.coefficients == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("budget", [6_000, 9_000, 14_000])
def test_no_other_rank_of_randlora_fills_a_budget_better(base: Path, budget: int) -> None:
    """Its coefficients do not fall all the way as the rank rises: they jump with the number of terms."""
    on = adapted_base(base, "all-linear")
    found = [one for one in configurations(base, budget, "all-linear") if (one.method, one.law) == ("randlora", "sign")]
    assert found
    for one in found:
        fitting = {
            rank: sum(RandLora(r=rank).count(out, in_) for _, out, in_ in on.matrices)
            for rank in range(1, 1 + min(min(out, in_) for _, out, in_ in on.matrices))
            if on.file_bytes(RandLoraConfig(r=rank, target_modules=on.targets, task_type="CAUSAL_LM"), one.bits)
            <= budget
        }
        assert fitting[one.options["rank"]] == max(fitting.values()), one.bits


def test_lora_is_as_peft_saves_it(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    one = next(one for one in configurations(base, 60_000, "all-linear") if one.method == "lora" and one.bits == 32)
    model: Any = get_peft_model(llama(), LoraConfig(r=one.options["rank"], target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size == one.bytes[32]


@pytest.mark.parametrize("tie", [None, "model"])
@pytest.mark.parametrize("method", ["nola", "vera", "pranc"])
def test_memory_of_training_holds_what_torch_holds(found: list[Configuration], method: str, tie: str | None) -> None:
    fitting = [one for one in found if (one.method, one.law, one.options.get("tie")) == (method, "sign", tie)]
    assert bool(fitting) == (tie is None or method != "vera")
    if not fitting:
        return
    one = fitting[0]
    model = adapted(one)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1 or v.ndim]
    gradients = [p.grad for p in trained if p.grad is not None]
    held = sum(t.numel() * t.element_size() for t in (*trained, *gradients, *moments))
    assert held == budgets.BYTES_OF_A_COEFFICIENT * one.coefficients
    layers = [layer for layer in model.modules() if isinstance(layer, RandbasisLinear)]
    parts = [part for layer in layers for part in layer.matrices("default")]
    bases = {id(stored): stored for part in parts for stored in part.bound.bases}
    kept = sum(
        {"dense": 4 * stored.slab.entries, "packed": stored.slab.packed_bytes}.get(stored.storage, 0)
        for stored in bases.values()
    )
    factors = one.training_bytes - held - kept
    assert factors == 8 * sum(
        part.bound.out_features * part.bound.in_features
        if method == "pranc"
        else part.bound.rank * (part.bound.out_features + part.bound.in_features)
        for part in parts
    )


def test_cost_of_lora_is_its_formula(base: Path) -> None:
    one = next(one for one in configurations(base, 60_000, "all-linear") if one.method == "lora")
    linear = [m for name, m in llama().named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    sides, areas = (sum(f(m.weight.shape) for m in linear) for f in (sum, lambda shape: shape[0] * shape[1]))
    assert one.cost == pytest.approx(3 * one.options["rank"] * sides / (2 * areas))


def test_the_best_stands_first(found: list[Configuration]) -> None:
    assert found[0].law == "sign"
    assert found[0].bits == budgets.PRECISION_ORDER[0]
    assert len({(one.method, one.law, one.options.get("tie"), one.bits) for one in found}) == len(found)


def test_one_vector_for_all_stands_before_one_for_each(found: list[Configuration]) -> None:
    nola = [one for one in found if one.method == "nola" and one.bits == budgets.PRECISION_ORDER[0]]
    assert [(one.law, one.options.get("tie")) for one in nola[:2]] == [("hashed", "model"), ("sign", None)]
    assert nola[0].why != nola[1].why


def test_nothing_fits(base: Path) -> None:
    with pytest.raises(BudgetError, match=r"budget 100 bytes is less than any adapter .* the smallest is .* bytes"):
        configurations(base, 100, "all-linear")


def test_the_smallest_that_is_named_fits_and_nothing_below_it(base: Path) -> None:
    with pytest.raises(BudgetError) as told:
        configurations(base, 100, "all-linear")
    smallest = int(str(told.value).partition(" bytes: give")[0].rpartition(" ")[2].replace(",", ""))
    assert min(one.bytes[one.bits] for one in configurations(base, smallest, "all-linear")) == smallest
    with pytest.raises(BudgetError):
        configurations(base, smallest - 1, "all-linear")


def test_targets_that_match_nothing(base: Path) -> None:
    with pytest.raises(TargetError):
        configurations(base, 4000, ["nowhere"])


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command(base: Path, tmp_path: Path) -> None:
    done = run("plan", "--model", base, "--budget", "4KB", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    first = document["configurations"][0]
    assert document["budget"] == 4000
    assert first["bytes"][str(first["bits"])] <= 4000
    assert {"method", "law", "coefficients", "bytes", "training_bytes", "cost", "why"} <= first.keys()
    same = run("plan", base, "--budget", "4000", "--json")
    assert json.loads(same.stdout)["configurations"] == document["configurations"]


def test_only_a_config_is_read(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "bare", **llama().config.to_dict())
    done = run("plan", folder, "--budget", "4KB", "--json")
    assert done.exit_code == 0, done.output


def test_a_configuration_is_written(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapter.yaml"
    assert run("plan", base, "--budget", "4KB", "--write", file, "--pick", "2", "--json").exit_code == 0
    second = configurations(base, 4000, "all-linear")[1]
    assert file.read_text() == config_lines(second, base, ("all-linear",))
    again = run("plan", base, "--budget", "4KB", "--write", file)
    assert again.exit_code == 2
    assert file.read_text() == config_lines(second, base, ("all-linear",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--budget", "4KB", "--rank", "4"), "--rank"),
        (("--write", "x.yaml"), "--budget"),
        (("--budget", "4KB", "--pick", "2"), "--write"),
        (("--budget", "4KB", "--model", "there"), "once"),
        (("--budget", "lots"), "budget"),
        (("--budget", "100"), "smallest"),
    ],
)
def test_what_is_refused(base: Path, words: tuple[str, ...], said: str) -> None:
    done = run("plan", base, *words)
    assert done.exit_code == 2
    assert said in done.output.replace("\n", " ")


def test_a_pick_that_is_not_there(base: Path, tmp_path: Path) -> None:
    done = run("plan", base, "--budget", "4KB", "--write", tmp_path / "a.yaml", "--pick", "999")
    assert done.exit_code == 2
    assert not (tmp_path / "a.yaml").exists()


def test_no_model() -> None:
    done = run("plan", "--budget", "4KB")
    assert done.exit_code == 2
    assert "--model" in done.output
