"""What is promised of speed and memory, computed from the rows: met, missed or not measured, with the figures.

An adapter's overhead is its step's time above that of PEFT LoRA r=1 in the same round. A figure is a median over rounds
or a quotient of medians; its interval is where 60 % of the figures fall when the rounds are drawn again.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks import adding, bank, gpu_decode, gpu_host, host_time
from benchmarks.adapters import FLOOR, Adapter
from benchmarks.basis_rate import PACKED
from benchmarks.gpu_expansion import GRAPH, OWN, REDRAWN
from benchmarks.inference import same_rank
from benchmarks.rows import Run
from benchmarks.switching import LOAD, LORA, NOLA, RANDLORA, SET

DRAWS = 400
GPU = "GPU: "
"""How the name of a target begins that is about a GPU."""

Figure = Callable[[Sequence[int]], float]
"""The figure of some rounds, by their numbers; a number may come more than once."""


@dataclass(frozen=True)
class Finding:
    """One figure for one target.

    Attributes:
        where: case and sides.
        value: the figure.
        low: a fifth of the figures of rounds drawn again is below.
        high: a fifth is above.
    """

    where: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Target:
    """A promise.

    Attributes:
        name: in words.
        limit: what the figure is held against.
        find: the figures of a run that it is about, with their names and number of rounds.
        at_least: whether the figure must reach the limit instead of staying below.
        unit: of the figure.
    """

    name: str
    limit: float
    find: Callable[[Run], Iterator[tuple[str, Figure, int]]]
    at_least: bool = False
    unit: str = "×"

    @property
    def on_gpu(self) -> bool:
        """Whether it is about a GPU."""
        return self.name.startswith(GPU)

    def findings(self, runs: Sequence[Run]) -> list[Finding]:
        """Its figures in some runs."""
        return [
            _finding(f"{run.case}: {which}" + (f", {run.device}" if self.on_gpu else ""), figure, rounds)
            for run in runs
            for which, figure, rounds in self.find(run)
        ]

    def is_met(self, finding: Finding) -> bool:
        """By the figure itself, not by its interval."""
        return finding.value >= self.limit if self.at_least else finding.value <= self.limit


def _finding(where: str, figure: Figure, rounds: int) -> Finding:
    drawn = random.Random(0)
    again = sorted(figure([drawn.randrange(rounds) for _ in range(rounds)]) for _ in range(DRAWS))
    return Finding(where, figure(range(rounds)), again[DRAWS // 5], again[-DRAWS // 5])


# --- figures ---


def _ratio(run: Run, own: str, other: str) -> tuple[str, Figure, int]:
    """Median of the quotients by round."""
    a, b = run.timings[own].values, run.timings[other].values
    return f"{own} to {other}", lambda rounds: statistics.median(a[i] / b[i] for i in rounds), len(a)


def _overheads(run: Run, own: str, other: str) -> tuple[str, Figure, int]:
    """Quotient of the median overheads; infinite where the other side has none."""
    a, b = run.timings[own].overheads, run.timings[other].overheads

    def figure(rounds: Sequence[int]) -> float:
        mine, theirs = (statistics.median(values[i] for i in rounds) for values in (a, b))
        return mine / theirs if theirs > 0 else float("inf")

    return f"{own} to {other}", figure, len(a)


def _present(run: Run, *sides: str) -> bool:
    return all(side in run.timings for side in sides)


def _tokens(run: Run) -> int:
    return int(run.parameters.get("tokens", 0))


# --- what each target is about ---


def _nola_steps(run: Run) -> Iterator[tuple[str, Figure, int]]:
    if run.family != "step" or _tokens(run) < 2048:
        return
    for side in run.timings:
        adapter = Adapter.named(side)
        other = f"PEFT LoRA r={adapter.r}"
        if adapter.kind == "NOLA" and adapter.k <= 256 and _present(run, other):
            yield _ratio(run, side, other)


def _published(run: Run) -> Iterator[tuple[str, Figure, int]]:
    own, other = "NOLA r=8 k=1000", "published NOLA r=8 k=1000"
    if run.family == "step" and _present(run, FLOOR, own, other):
        yield _overheads(run, own, other)


def _against_peft(kind: str, tokens: int | None) -> Callable[[Run], Iterator[tuple[str, Figure, int]]]:
    def find(run: Run) -> Iterator[tuple[str, Figure, int]]:
        if run.family != "step" or (tokens is not None and _tokens(run) != tokens) or not _present(run, FLOOR):
            return
        for side in run.timings:
            if Adapter.named(side).kind == kind and _present(run, f"PEFT {side}"):
                yield _overheads(run, side, f"PEFT {side}")

    return find


def _randlora_memory(run: Run) -> Iterator[tuple[str, Figure, int]]:
    if run.family == "memory" and _present(run, "RandLoRA r=32", "PEFT LoRA r=16"):
        yield _ratio(run, "RandLoRA r=32", "PEFT LoRA r=16")


def _decoding(run: Run) -> Iterator[tuple[str, Figure, int]]:
    if run.family != "decode":
        return
    for own, other in same_rank(int(run.parameters["rank"])).items():
        if _present(run, own, other):
            yield _ratio(run, own, other)


def _switching(run: Run) -> Iterator[tuple[str, Figure, int]]:
    for name in (NOLA, RANDLORA):
        for loaded in (LORA, name):
            if run.family == "switch" and _present(run, f"{loaded}: {LOAD}", f"{name}: {SET}"):
                yield _ratio(run, f"{loaded}: {LOAD}", f"{name}: {SET}")


def _host_time(run: Run) -> Iterator[tuple[str, Figure, int]]:
    if run.family == "host" and _present(run, host_time.LORA):
        yield from (_ratio(run, side, host_time.LORA) for side in run.timings if side != host_time.LORA)


def _generation(run: Run) -> Iterator[tuple[str, Figure, int]]:
    if run.family == "basis" and run.parameters["what"] == PACKED and "compiled" in run.timings:
        values = run.timings["compiled"].values
        work = float(run.rows[0]["rate"]) * statistics.median(run.timings["reference"].values)
        name = f"compiled, {run.threads} threads"
        yield name, lambda rounds: work / statistics.median(values[i] for i in rounds), len(values)


def _gpu_expansion(model: str) -> Callable[[Run], Iterator[tuple[str, Figure, int]]]:
    """Milliseconds."""

    def find(run: Run) -> Iterator[tuple[str, Figure, int]]:
        for side in (REDRAWN, GRAPH, OWN):
            if run.family == "gpu expand" and run.parameters["model"] == model and side in run.timings:
                values = run.timings[side].values
                yield (
                    side,
                    lambda rounds, values=values: 1e3 * statistics.median(values[i] for i in rounds),
                    len(values),
                )

    return find


def _gpu_steps(
    kind: str, tokens: int, *, layers: int = 1, families: Sequence[str] = ("gpu step", "gpu model")
) -> Callable[[Run], Iterator[tuple[str, Figure, int]]]:
    """Steps of so many tokens, of models of so many layers or more."""

    def find(run: Run) -> Iterator[tuple[str, Figure, int]]:
        other = "PEFT LoRA r=16"
        if run.family not in families or _tokens(run) != tokens or int(run.parameters.get("layers", 1)) < layers:
            return
        if _present(run, other):
            yield from (_ratio(run, side, other) for side in run.timings if _is_simple(side, kind))

    return find


def _is_simple(side: str, kind: str) -> bool:
    """Whether a side is of a kind, and, for NOLA, of k = 128 with a shared basis."""
    adapter = Adapter.named(side)
    return adapter.kind == kind and (kind != "NOLA" or (adapter.k == 128 and not adapter.unique))


def _gpu_memory(run: Run) -> Iterator[tuple[str, Figure, int]]:
    if run.family == "gpu memory" and _present(run, "RandLoRA r=32", "PEFT RandLoRA r=32"):
        yield _ratio(run, "RandLoRA r=32", "PEFT RandLoRA r=32")


def _gpu_decode(run: Run) -> Iterator[tuple[str, Figure, int]]:
    if run.family == "gpu decode" and _present(run, gpu_decode.PLAIN):
        ours = [side for side in run.timings if side != gpu_decode.PLAIN and Adapter.named(side).is_ours]
        yield from (_ratio(run, side, gpu_decode.PLAIN) for side in ours)


def _gpu_mixed(run: Run) -> Iterator[tuple[str, Figure, int]]:
    one, many = (f"{gpu_decode.NOLA}, {count} distinct" for count in (1, 32))
    if run.family == "gpu mixed decode" and _present(run, one, many):
        yield _ratio(run, many, one)


def _gpu_host(run: Run) -> Iterator[tuple[str, Figure, int]]:
    """Microseconds of one sum."""
    if run.family == "gpu host":
        passes = float(run.parameters["passes"])
        for side in (gpu_host.RECOMPUTED, gpu_host.AUTOCAST):
            if side in run.timings:
                values = run.timings[side].values
                yield (
                    side,
                    lambda rounds, values=values: 1e6 / passes * statistics.median(values[i] for i in rounds),
                    len(values),
                )


def _adding(family: str) -> Callable[[Run], Iterator[tuple[str, Figure, int]]]:
    def find(run: Run) -> Iterator[tuple[str, Figure, int]]:
        if run.family == family and run.parameters["what"] in (adding.ADD, adding.LOAD) and _present(run, adding.LORA):
            yield from (_ratio(run, side, adding.LORA) for side in run.timings if side != adding.LORA)

    return find


def _bank_rate(run: Run) -> Iterator[tuple[str, Figure, int]]:
    for side in [side for side in run.timings if run.family == "bank" and side.endswith(", 32 distinct")]:
        one = side.replace("32 distinct", "1 distinct")
        if side != f"{bank.LORA}, 32 distinct" and _present(run, one):
            yield _ratio(run, one, side)  # times, so that the quotient is that of the rates


def _bank_against_peft(run: Run) -> Iterator[tuple[str, Figure, int]]:
    peft = f"{bank.LORA}, 32 distinct"
    for side in [side for side in run.timings if run.family == "bank" and side.endswith(", 32 distinct")]:
        if side != peft and _present(run, peft):
            yield _ratio(run, peft, side)


def _bank_loads(run: Run) -> Iterator[tuple[str, Figure, int]]:
    if run.family == bank.LOADED:
        ((side, timing),) = run.timings.items()
        yield side, lambda rounds: 1000 / statistics.median(timing.values[i] for i in rounds), len(timing.values)


def _bank_cold(run: Run) -> Iterator[tuple[str, Figure, int]]:
    if run.family == bank.COLD and _present(run, bank.COLD_SIDES[0]):
        values = run.timings[bank.COLD_SIDES[0]].values
        yield bank.COLD_SIDES[0], lambda rounds: 1e3 * statistics.median(values[i] for i in rounds), len(values)


def _bank_memory(run: Run) -> Iterator[tuple[str, Figure, int]]:
    if run.family == bank.MEMORY and run.parameters.get("adapters") == 100_000:
        values = run.timings["resident in a bank"].values
        yield "resident in a bank", lambda rounds: statistics.median(values[i] for i in rounds) / 1e9, len(values)


TARGETS = (
    Target("step of NOLA, k ≤ 256, 2,048 tokens or more, to that of PEFT LoRA of the same rank", 1.03, _nola_steps),
    Target("overhead of NOLA, k = 1000, to that of the published algorithm", 0.2, _published),
    Target("overhead of RandLoRA at 2,048 tokens to that of PEFT's", 0.4, _against_peft("RandLoRA", 2048)),
    Target("overhead of RandLoRA at 8,192 tokens to that of PEFT's", 0.3, _against_peft("RandLoRA", 8192)),
    Target("peak memory of RandLoRA to that of PEFT LoRA r=16", 1.05, _randlora_memory),
    Target("overhead of VeRA, r ≥ 256, to that of PEFT's", 0.7, _against_peft("VeRA", None)),
    Target("decoding with kept factors to PEFT LoRA of the rank of the factors", 1.03, _decoding),
    Target(
        "load_adapter, of PEFT LoRA or of the same adapter, to a switch between adapters in memory",
        100,
        _switching,
        at_least=True,
    ),
    Target("host time of one small layer to that of PEFT LoRA", 1.6, _host_time),
    Target("packed signs generated", 10, _generation, at_least=True, unit="Gbit/s"),
    Target("GPU: expanding an adapter of LLaMA-2 7B, k = 128", 2, _gpu_expansion("LLaMA-2 7B"), unit="ms"),
    Target("GPU: expanding an adapter of LLaMA-2 70B, k = 512", 60, _gpu_expansion("LLaMA-2 70B"), unit="ms"),
    Target("putting on or loading many adapters to PEFT LoRA", 1.0, _adding("add")),
    Target("bank: tokens a second of 32 users to one for all rows", 0.95, _bank_rate, at_least=True),
    Target("bank: tokens a second to PEFT's LoRA, 32 users", 2.5, _bank_against_peft, at_least=True),
    Target("bank: adapters loaded from bytes", 10_000, _bank_loads, at_least=True, unit="a second"),
    Target("bank: an adapter from the store, ready for a batch", 5, _bank_cold, unit="ms"),
    Target("bank: memory of 100,000 adapters of about 5 KB", 0.7, _bank_memory, unit="GB"),
    Target(
        "GPU: step of NOLA r=16 k=128, 8 layers or more, 4,096 tokens, to PEFT LoRA r=16",
        1.02,
        _gpu_steps("NOLA", 4096, layers=8, families=("gpu model",)),
    ),
    Target("GPU: step of NOLA r=16 k=128 at 16,384 tokens to PEFT LoRA r=16", 0.9, _gpu_steps("NOLA", 16384)),
    Target("GPU: step of RandLoRA r=32 at 4,096 tokens to PEFT LoRA r=16", 1.6, _gpu_steps("RandLoRA", 4096)),
    Target("GPU: step of RandLoRA r=32 at 16,384 tokens to PEFT LoRA r=16", 1.4, _gpu_steps("RandLoRA", 16384)),
    Target("GPU: peak memory of RandLoRA to that of PEFT's", 0.8, _gpu_memory),
    Target("GPU: step of VeRA r=256 at 4,096 tokens to PEFT LoRA r=16", 1.02, _gpu_steps("VeRA", 4096)),
    Target("GPU: decoding with one adapter to the plain model", 1.25, _gpu_decode),
    Target("GPU: decoding with 32 distinct adapters to one", 1.2, _gpu_mixed),
    Target("GPU: host time of a sum, forward and back", 400, _gpu_host, unit="µs"),
    Target("GPU: putting on many adapters to PEFT LoRA", 1.0, _adding("gpu add")),
)


def verdicts(runs: Sequence[Run]) -> Iterator[tuple[Target, Finding | None]]:
    """Every target with each of its figures; with None when there is no figure."""
    for target in TARGETS:
        yield from ((target, finding) for finding in target.findings(runs) or [None])
