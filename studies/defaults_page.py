"""The rows of the sweep to the page of defaults: what each method takes, and how far that is from its best."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.tables import span, table
from randbasis.train.default_choices import HEAD_RATES, METHODS, SWEPT
from studies.sweep import HEAD_RATE, SETS, default_rate

Row = dict[str, str]

SMALL = 0.01
"""The criterion: within a point of the best, or 5 % of what the best takes off the loss."""
OF_THE_GAIN = 0.05
LEARNED = 0.03
"""What a metric has to gain for a set to tell rates apart."""
INTRODUCTION = """\
# Defaults

Written by `make sweep-defaults` from the rows in `benchmarks/results/defaults.csv`, one line a run, which it makes
where they are missing. Do not edit this page.

Where `randbasis train` is given no learning rate, rank, basis, alpha, warmup or schedule, it takes those of
`randbasis.train.default_choices`, and says so with the reasons in its summary. A rate
that is given is taken as it is, and so is `--head-learning-rate`; `auto` asks for the default by its name.
"""
BETWEEN = """\
A rate falls with the width of the base: `rate = table · (swept width / width) ^ falls`, rounded to one digit. Widths
64, 192 and 384 were measured, each with a task of its own; larger ones are extrapolated, with a power by which the
rates that were published for widths of 768 to 4,096 ([methods](methods.md)) come out within a factor of about three.
"""


def write_page(rows: Sequence[Row], page: Path) -> None:
    """Write the page.

    Args:
        rows: of the sweep.
        page: the Markdown file.
    """
    parts = [INTRODUCTION, "## What is taken\n", _table_of_defaults() + "\n", BETWEEN, *_measured(rows)]
    page.write_text("\n".join(parts), encoding="utf-8")


def _table_of_defaults() -> str:
    lines = [
        [
            method,
            *("" if value is None else f"{value:g}" for value in (own.rank, own.basis, own.scale)),
            *(f"{own.rates[task]:g}" for task in SWEPT),
            f"{own.falls:g}",
        ]
        for method, own in METHODS.items()
    ]
    heads = ["method", "rank", "basis", "alpha / rank", *(f"{t}, width {w}" for t, (_, w) in SWEPT.items()), "falls"]
    head = "; ".join(f"{task} {rate:g}" for task, rate in HEAD_RATES.items())
    return f"{table(heads, lines)}\n\nLearning rate of a head beside an adapter: {head}, at any width."


def _measured(rows: Sequence[Row]) -> Iterator[str]:
    shared = [row for row in rows if _is_of_grid(row)]
    yield "## What was measured\n"
    yield (
        f"{span(row['date'] for row in rows)}, one seed a run, float32, linear schedule, batches of 16, "
        f"all linear layers, head at {HEAD_RATE:g}; scored on rows held out from training.\n"
    )
    misses: list[str] = []
    for name in SETS:
        own = [row for row in shared if row["set"] == name]
        if own:
            text, missed = _of_set(name, own)
            misses += missed
            yield text
    yield "## Where the default misses\n"
    yield (
        "\n".join(
            [
                "The aim was a point of the metric, or 5 % of what the best rate takes off the loss for E2E. With one "
                "seed and 400 held-out rows (240 of flowers12) a difference of two points is within the noise. "
                "A row with one rate has nothing to be compared with.\n",
                *(misses or ["- Nowhere, of what was measured."]),
            ]
        )
        + "\n"
    )


def _is_of_grid(row: Row) -> bool:
    return row["head_rate"] in ("", f"{HEAD_RATE:g}") and not (row["rank"] or row["basis"] or row["alpha"])


def _of_set(name: str, rows: Sequence[Row]) -> tuple[str, list[str]]:
    """The table of a set, and a line for each method whose default misses."""
    rates = sorted({float(row["rate"]) for row in rows})
    lines: list[list[str]] = []
    misses: list[str] = []
    for method in METHODS:
        own = {float(row["rate"]): row for row in rows if row["method"] == method and row["seed"] == "0"}
        if not own:
            continue
        taken = default_rate(name, method)
        best = max(own, key=lambda rate: _worth(own[rate]))
        lines.append([method, *(_cell(own.get(rate), rate == taken, rate == best) for rate in rates), _gap(own, taken)])
        if taken not in own:
            misses.append(f"- {name}, {method}: {taken:g} was not run.")
        elif _behind(own, taken) > 1:
            misses.append(f"- {name}, {method}: {taken:g} is at {_gap(own, taken)} against {best:g}.")
    row = rows[0]
    about = f"{row['metric']} after {row['steps']} steps (before: {row['before']}); bold: the default, star: the best"
    if row["metric"] != "loss" and max(map(_worth, rows)) < float(row["before"]) + LEARNED:
        about, misses = f"{about}. Nothing was learned at any of these rates, so none is chosen by them", []
    heads = ["method", *(f"{rate:g}" for rate in rates), "default − best"]
    return f"### {name}\n\n{about}.\n\n{table(heads, lines)}\n", misses


def _worth(row: Row) -> float:
    """Greater is better; a run that diverged is worth nothing."""
    if not row["after"]:
        return float("-inf")
    return float(row["after"]) * (-1 if row["metric"] == "loss" else 1)


def _behind(own: dict[float, Row], taken: float) -> float:
    """How far a rate is behind the best, in units of what is allowed."""
    best = max(own.values(), key=_worth)
    allowed = SMALL
    if best["metric"] == "loss":
        allowed = OF_THE_GAIN * (float(best["before"]) - float(best["after"]))
    return round((_worth(best) - _worth(own[taken])) / allowed, 6)


def _gap(own: dict[float, Row], taken: float) -> str:
    if taken not in own:
        return "?"
    best = max(own.values(), key=_worth)
    value = _worth(own[taken]) - _worth(best)
    if best["metric"] != "loss":
        return f"{100 * value:.1f}"
    return f"{100 * value / (float(best['before']) - float(best['after'])):.1f} % of the gain"


def _cell(row: Row | None, taken: bool, best: bool) -> str:
    if row is None:
        return ""
    text = "diverged" if not row["after"] else row["after"] if row["metric"] == "loss" else f"{float(row['after']):.3f}"
    text += "*" if best else ""
    return f"**{text}**" if taken else text
