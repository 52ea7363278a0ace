"""Targets against figures computed by hand from synthetic rows."""

import pytest
from synthetic_rows import run_of

from benchmarks.adapters import FLOOR
from benchmarks.rows import Run
from benchmarks.targets import TARGETS, Finding, Target, verdicts

ROUNDS = 5


def found(words: str, *runs: Run) -> list[tuple[float, bool]]:
    """Figures of the one target whose name contains some words, and whether it is met."""
    (target,) = [target for target in TARGETS if words in target.name]
    return [(finding.value, target.is_met(finding)) for finding in target.findings(runs)]


def step(tokens: int, **milliseconds: float) -> Run:
    """A step; names of sides have underscores for spaces, and the floor takes 100 ms."""
    sides = {FLOOR: [0.1] * ROUNDS}
    sides |= {name: [value / 1e3] * ROUNDS for name, value in milliseconds.items()}
    return run_of("step", sides, parameters={"model": "m", "tokens": tokens})


def test_steps_of_nola_against_lora_of_the_same_rank_from_2048_tokens_on() -> None:
    sides = {"PEFT LoRA r=8": 110, "NOLA r=8 k=64": 111, "NOLA r=8 k=256 unique": 121, "NOLA r=8 k=1000": 300}
    assert found("step of NOLA, k", step(512, **sides)) == []
    small, unique = found("step of NOLA, k", step(2048, **sides))
    assert small == (pytest.approx(111 / 110), True)
    assert unique == (pytest.approx(1.1), False)


def test_overhead_of_the_published_algorithm() -> None:
    name = "NOLA r=8 k=1000"
    assert found("published", step(512, **{name: 120, f"published {name}": 210})) == [(pytest.approx(20 / 110), True)]
    assert found("published", step(512, **{name: 150, f"published {name}": 210})) == [(pytest.approx(50 / 110), False)]


def test_overhead_of_randlora_has_one_limit_at_2048_and_another_at_8192_tokens() -> None:
    sides = {"RandLoRA r=32": 135, "PEFT RandLoRA r=32": 200}
    assert found("RandLoRA at 2,048", step(2048, **sides)) == [(pytest.approx(0.35), True)]
    assert found("RandLoRA at 8,192", step(8192, **sides)) == [(pytest.approx(0.35), False)]
    assert found("RandLoRA at 2,048", step(512, **sides)) == []


def test_a_side_without_overhead_cannot_be_beaten() -> None:
    assert found("of VeRA, r", step(512, **{"VeRA r=256": 110, "PEFT VeRA r=256": 100})) == [(float("inf"), False)]
    assert found("of VeRA, r", step(512, **{"VeRA r=256": 95, "PEFT VeRA r=256": 110})) == [(pytest.approx(-0.5), True)]


def test_peak_memory() -> None:
    sides = {"PEFT LoRA r=16": [1000.0], "RandLoRA r=32": [1051.0]}
    assert found("RandLoRA to that of PEFT LoRA", run_of("memory", sides, quantity="MB")) == [
        (pytest.approx(1.051), False)
    ]


def test_decoding_is_held_against_lora_of_the_rank_of_the_factors() -> None:
    times = {"base": 9, "PEFT LoRA r=8": 10, "PEFT LoRA r=256": 20, "PEFT LoRA r=512": 40}
    times |= {"NOLA r=8 k=256": 10.2, "VeRA r=256": 21, "RandLoRA r=32": 20}
    run = run_of("decode", {name: [value] * ROUNDS for name, value in times.items()}, parameters={"rank": 512})
    nola, vera, randlora = found("decoding with kept", run)
    assert nola == (pytest.approx(1.02), True)
    assert vera == (pytest.approx(1.05), False)
    assert randlora == (pytest.approx(0.5), True)


def test_switching_is_held_against_loading_lora_and_against_loading_the_same_adapter() -> None:
    sides = {"PEFT LoRA r=8: load_adapter": [30.0] * 3, "NOLA r=8 k=256: load_adapter": [20.0] * 3}
    sides["NOLA r=8 k=256: set_adapter"] = [0.25, 0.2, 0.3]
    assert found("switch", run_of("switch", sides)) == [(pytest.approx(120.0), True), (pytest.approx(80.0), False)]


def test_signs_a_second_are_those_of_the_compiled_side() -> None:
    sides = {"reference": [4.0] * 3, "compiled": [0.5] * 3}
    run = run_of("basis", sides, work=6.0, unit="Gbit/s", parameters={"what": "packed signs"})
    assert found("packed signs", run) == [(pytest.approx(12.0, rel=1e-3), True)]


def test_the_interval_comes_from_the_rounds_and_is_the_same_every_time() -> None:
    base, own = [1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.1, 1.2, 1.3, 9.0]
    run = run_of("memory", {"PEFT LoRA r=16": base, "RandLoRA r=32": own})
    (target,) = [target for target in TARGETS if "of RandLoRA to that of PEFT LoRA" in target.name]
    (first,), (again,) = target.findings([run]), target.findings([run])
    assert first == again
    assert first.value == 1.2
    assert first.low < first.value < first.high


def test_every_target_has_a_verdict_and_says_so_when_it_was_not_measured() -> None:
    assert [finding for _, finding in verdicts([])] == [None] * len(TARGETS)
    assert {target.name for target, _ in verdicts([])} == {target.name for target in TARGETS}


@pytest.mark.parametrize(("at_least", "value", "met"), [(True, 9.0, False), (True, 10.0, True), (False, 10.1, False)])
def test_a_limit_is_met_by_reaching_it(at_least: bool, value: float, met: bool) -> None:
    target = Target("t", 10.0, lambda _: iter(()), at_least=at_least)
    assert target.is_met(Finding("w", value, 0.0, 0.0)) is met


def test_expansion_on_a_gpu_is_in_milliseconds_and_by_side() -> None:
    sides = {"all layers, basis redrawn": [1.9e-3] * 5, "matrix by matrix, basis redrawn": [0.04] * 5}
    sides["all layers, own bases redrawn"] = [2.5e-3] * 5
    run = run_of("gpu expand", sides, parameters={"model": "LLaMA-2 7B"})
    assert found("LLaMA-2 7B", run) == [(pytest.approx(1.9), True), (pytest.approx(2.5), False)]
    assert found("LLaMA-2 70B", run) == []


def test_steps_on_a_gpu_against_lora_of_rank_16() -> None:
    sides = {"PEFT LoRA r=16": [0.1] * 5, "NOLA r=16 k=128": [0.089] * 5, "NOLA r=16 k=128 unique": [0.2] * 5}
    sides |= {"NOLA r=16 k=512": [0.2] * 5, "VeRA r=256": [0.101] * 5, "RandLoRA r=32": [0.15] * 5}
    few, many = (run_of("gpu step", sides, parameters={"model": "m", "tokens": n}) for n in (4096, 16384))
    assert found("NOLA r=16 k=128 at 16,384", few, many) == [(pytest.approx(0.89), True)]
    assert found("RandLoRA r=32 at 4,096", few, many) == [(pytest.approx(1.5), True)]
    assert found("RandLoRA r=32 at 16,384", few, many) == [(pytest.approx(1.5), False)]
    assert found("VeRA r=256 at 4,096", few, many) == [(pytest.approx(1.01), True)]
    assert found("step of NOLA, k", few, many) == []


def test_a_step_of_nola_at_4096_tokens_counts_on_a_gpu_from_8_layers_on() -> None:
    sides = {"PEFT LoRA r=16": [0.1] * 5, "NOLA r=16 k=128": [0.101] * 5}
    runs = [
        run_of("gpu model", sides, parameters={"model": "m", "tokens": 4096, "layers": layers}) for layers in (2, 8, 32)
    ]
    assert found("8 layers or more", *runs) == [(pytest.approx(1.01), True)] * 2


def test_memory_decoding_and_the_host_on_a_gpu() -> None:
    sides = {"PEFT LoRA r=1": [1.0], "RandLoRA r=32": [2000.0], "PEFT RandLoRA r=32": [2500.0]}
    assert found("peak memory of RandLoRA to that of PEFT's", run_of("gpu memory", sides, quantity="MB")) == [
        (0.8, True)
    ]
    sides = {"base": [0.02] * 5, "NOLA r=8 k=64": [0.026] * 5, "PEFT LoRA r=8": [0.04] * 5}
    assert found("one adapter to the plain", run_of("gpu decode", sides)) == [(pytest.approx(1.3), False)]
    sides = {f"NOLA r=8 k=64, {n} distinct": [0.02 + n / 1e4] * 5 for n in (1, 8, 32)}
    assert found("32 distinct", run_of("gpu mixed decode", sides)) == [(pytest.approx(0.0232 / 0.0201), True)]
    sides = {"torch's product": [0.001] * 5, "sum, redrawn": [0.01] * 5, "sum, stored, under autocast": [0.006] * 5}
    run = run_of("gpu host", sides, parameters={"passes": 20})
    assert found("host time of a sum", run) == [(pytest.approx(500), False), (pytest.approx(300), True)]


def test_putting_adapters_on_is_held_against_lora_and_switching_between_them_is_not() -> None:
    sides = {"PEFT LoRA r=8": [10.0] * 3, "NOLA r=8 k=64": [4.0] * 3, "NOLA r=8 k=64 unique": [12.0] * 3}
    runs = [run_of("add", sides, parameters={"what": what}) for what in ("put on", "switch to")]
    assert found("putting on or loading", *runs) == [(pytest.approx(0.4), True), (pytest.approx(1.2), False)]
    assert found("GPU: putting on", *runs) == []


def test_a_figure_of_a_gpu_names_the_card() -> None:
    sides = {"PEFT LoRA r=16": [0.1] * 5, "RandLoRA r=32": [0.15] * 5}
    run = run_of("gpu step", sides, parameters={"model": "m", "tokens": 4096})
    run.rows[0]["device"] = "NVIDIA H100"
    (target,) = [target for target in TARGETS if "RandLoRA r=32 at 4,096" in target.name]
    assert target.findings([run])[0].where.endswith("to PEFT LoRA r=16, NVIDIA H100")
