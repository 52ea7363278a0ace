"""Rows to Markdown tables, one function a kind of table."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

from benchmarks import plan_cost
from benchmarks.case import spread
from benchmarks.rows import Run
from benchmarks.targets import Finding, Target, verdicts

NOTHING = "No rows yet."
SIZES = "packed size"
"""The family whose values are exact: bytes of files."""


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table, the first columns aligned to the left, the others to the right."""
    rule = "|" + "---|" * left + "---:|" * (len(heads) - left)
    return "\n".join(["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def family_table(family: str, runs: Sequence[Run]) -> str:
    """All cases of a family: where and when they were measured, then a table each."""
    chosen = [run for run in runs if run.family == family]
    if not chosen:
        return NOTHING
    drawn = {"growth": _growth, "memory growth": _growth, SIZES: _sizes}.get(family, _sides)
    where = dict.fromkeys(run.device for run in chosen) if family.startswith("gpu") else [None]
    parts: list[str] = []
    for device in where:
        own = [run for run in chosen if device in (None, run.device)]
        parts += [*([f"**On an {device}.**"] if device else []), provenance(own), *drawn(own)]
    return "\n\n".join(parts)


def provenance(runs: Sequence[Run]) -> str:
    """Machine, dates, versions and revisions of some runs, and which were disturbed."""
    rows = [run.rows[0] for run in runs]
    where = sorted({f"{row['device']}, {row['threads']} threads of {row['cores']} cores" for row in rows})
    revisions = sorted({row["revision"] for row in rows})
    busy = sorted({f"{row['case']} ({row['note']})" for row in rows if row["note"]})
    parts = [
        "; ".join(where),
        span(row["date"][:10] for row in rows),
        "; ".join(sorted({row["versions"] for row in rows})),
        f"revision {', '.join(revisions)}",
    ]
    return ". ".join(parts) + "." + (f" Disturbed: {'; '.join(busy)}." if busy else "")


def span(days: Iterable[str]) -> str:
    """The first and the last of some days, or the one there is."""
    first, *_, last = sorted(days) * 2
    return first if first == last else f"{first} to {last}"


def _sides(runs: Sequence[Run]) -> Iterator[str]:
    """One table a case."""
    for run in runs:
        has_rate = any(row["unit"] for row in run.rows)
        unit = next((row["unit"] for row in run.rows), "")
        quantity = run.rows[0]["quantity"]
        heads = ["", f"median, {_unit(quantity)}", "p20–p80", "ratio", "p20–p80"]
        heads += [f"above the first, {_unit(quantity)}"] + ([unit] if has_rate else [])
        lines = [
            _line(row, timing.values, has_rate) for row, timing in zip(run.rows, run.timings.values(), strict=True)
        ]
        yield f"**{run.case}** ({run.rows[0]['rounds']} rounds; {run.rows[0]['checked']})\n\n{table(heads, lines)}"


def _unit(quantity: str) -> str:
    return "ms" if quantity == "s" else quantity


def _line(row: dict[str, str], values: Sequence[float], has_rate: bool) -> list[str]:
    factor = 1e3 if row["quantity"] == "s" else 1.0
    median, p20, p80 = (number(factor * value) for value in spread(values))
    ratios = [f"{float(row['ratio']):.3g}", f"{float(row['ratio_p20']):.3g}–{float(row['ratio_p80']):.3g}"]
    rate = [f"{number(float(row['rate']))}"] if has_rate else []
    over = number(factor * float(row["over"])) if row["side"] != row["baseline"] else ""
    return [row["side"], median, f"{p20}–{p80}", *ratios, over, *rate]


def number(value: float) -> str:
    """Three digits, with separators of thousands."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _growth(runs: Sequence[Run]) -> Iterator[str]:
    """One table an axis: values down, methods across."""
    for axis in dict.fromkeys(str(run.parameters["axis"]) for run in runs):
        points = sorted((run for run in runs if run.parameters["axis"] == axis), key=lambda run: run.parameters[axis])
        names = [[method_of(side) for side in run.timings] for run in points]
        heads = [axis, *(f"{name}, {_unit(points[0].rows[0]['quantity'])}" for name in names[0])]
        factor = 1e3 if points[0].rows[0]["quantity"] == "s" else 1.0
        lines = [
            [str(run.parameters[axis]), *(number(factor * statistics.median(t.values)) for t in run.timings.values())]
            for run in points
        ]
        fixed = ", ".join(f"{k} {v}" for k, v in points[0].parameters.items() if k not in (axis, "axis"))
        yield f"**{axis}**, at {fixed}\n\n{table(heads, lines, left=0)}"


def _sizes(runs: Sequence[Run]) -> Iterator[str]:
    """One table: what was packed down, what it weighs across."""
    heads = [*runs[0].parameters, *(f"{side}, {runs[0].rows[0]['quantity']}" for side in runs[0].timings)]
    lines = [
        [
            *(value if isinstance(value, str) else f"{value:,}" for value in run.parameters.values()),
            *(f"{timing.values[0]:,.0f}" for timing in run.timings.values()),
        ]
        for run in runs
    ]
    yield table(heads, lines)


def method_of(side: str) -> str:
    """A side without the numbers that an axis changes."""
    words = [word for word in side.split() if "=" not in word]
    return " ".join(words) + (" r=1" if side.endswith(" r=1") else "")


def targets_table(runs: Sequence[Run]) -> str:
    """Every target with its figures."""
    lines = [_verdict(target, finding) for target, finding in verdicts(runs)]
    return table(["target", "where", "limit", "measured", "20–80 %", ""], lines, left=2)


def _verdict(target: Target, finding: Finding | None) -> list[str]:
    limit = f"{'≥' if target.at_least else '≤'} {target.limit:g} {target.unit}"
    if finding is None:
        return [target.name, "", limit, "", "", "not measured"]
    word = "met" if target.is_met(finding) else "**missed**"
    interval = f"{finding.low:.3g}–{finding.high:.3g}"
    return [target.name, finding.where, limit, f"{finding.value:.3g} {target.unit}", interval, word]


def plan_cost_table(runs: Sequence[Run]) -> str:
    """Counted steps beside timed ones."""
    return table(plan_cost.HEADS, list(plan_cost.lines(runs)), left=3)


def tables(runs: Sequence[Run]) -> dict[str, Callable[[], str]]:
    """Name of a marker → what stands there."""
    families = [
        *(
            "step",
            "parts",
            "memory",
            "basis",
            "sums",
            "prefill",
            "decode",
            "expand",
            "switch",
            "growth",
            "memory growth",
            "host",
            SIZES,
        ),
        "add",
        *("bank", "bank load", "bank cold", "bank memory", "serving", "gpu bank"),
        *("gpu basis", "gpu expand", "gpu step", "gpu memory", "gpu project"),
        *("gpu model", "gpu decode", "gpu mixed decode", "gpu host", "gpu add"),
        *dict.fromkeys(run.family for run in runs),
    ]
    made: dict[str, Callable[[], str]] = {
        "targets": lambda: targets_table(runs),
        "plan cost": lambda: plan_cost_table(runs),
    }
    for family in families:
        made[family] = lambda family=family: family_table(family, runs)
    return made
