"""LINES → TABLES: for people (Markdown; the page renders the same cells) and for programs (CSV, JSON)."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from randbasis.compare.report import wording
from randbasis.compare.report.lines import Line, Results
from randbasis.compare.report.measures import DeltaRate, Interval, Reach, bytes_to, delta_rate, interval
from randbasis.compare.study import Study

SHARES = (0.95, 0.99)


@dataclass(frozen=True)
class Table:
    """Cells with their heads.

    Attributes:
        heads: of the columns.
        rows: as many cells each.
        left: how many columns are words, the first ones.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int

    def markdown(self) -> str:
        """As Markdown; a cell cannot hold a bar or a tag of its own."""
        rule = "|" + "---|" * self.left + "---:|" * (len(self.heads) - self.left)
        lines = (
            " | ".join(wording.untagged(cell).replace("|", "\\|") for cell in cells)
            for cells in (self.heads, *self.rows)
        )
        head, *rest = (f"| {line} |" for line in lines)
        return "\n".join((head, rule, *rest))


@dataclass(frozen=True)
class Summary:
    """What one curve needs for equal quality.

    Attributes:
        curve: its name.
        delta: bytes against the anchor's; None where there is no anchor or the curve is the anchor.
        reaches: share of the gain → bytes; empty where no row is named whose gain it is.
    """

    curve: str
    delta: DeltaRate | None
    reaches: dict[float, Reach]


def summaries(results: Results) -> list[Summary]:
    """One a curve, in the order of the rows."""
    base, whole = results.base, results.of_row(results.gain_of)
    ends = [line.score(results.metric) for line in (base, whole) if line]
    found: list[Summary] = []
    for curve in results.curves():
        points, reaches = results.points(curve), {}
        if len(ends) == 2 and ends[0] and ends[1]:
            start, end = ends[0].mean, ends[1].mean
            reaches = {one: bytes_to(points, start, end, one, higher=results.higher) for one in SHARES}
        anchor = results.points(results.anchor or "")
        compared = results.anchor and curve != results.anchor
        delta = delta_rate(points, anchor, higher=results.higher) if compared else None
        found.append(Summary(curve, delta, reaches))
    return found


def summary_table(results: Results) -> Table | None:
    """Delta rate and bytes to shares of the gain, a line a curve; None where the study asks for neither."""
    found = summaries(results)
    if not any(one.delta or one.reaches for one in found):
        return None
    heads = ("curve", "bytes at equal metric", f"over {wording.metric_name(results.metric)}", "points on envelope",
             *(f"bytes to {100 * share:.0f} % of the gain" for share in SHARES))  # fmt: skip
    rows = [
        (
            one.curve,
            wording.delta_rate(one.delta) if one.delta else "anchor" if one.curve == results.anchor else "",
            wording.overlap(one.delta, results.metric) if one.delta else "",
            wording.on_envelope(one.delta) if one.delta else "",
            *(wording.reach(one.reaches[share]) if one.reaches else "" for share in SHARES),
        )
        for one in found
    ]
    return _without_empty(Table(heads, tuple(rows), 1))


def line_table(results: Results) -> Table:
    """Every row and every way to store it; what belongs to the run is said in its first line. Best mean in bold."""
    metric, rows = results.metric, [_cells(results, line) for line in results.lines]
    best = _best(results)
    at = 6
    for i, line in enumerate(results.lines):
        if line is best:
            rows[i] = (*rows[i][:at], f"**{rows[i][at]}**", *rows[i][at + 1 :])
    heads = ("row", "configuration", "coefficients", "file, bytes", "of these head", "rate (tried)",
             wording.metric_name(metric), "to the anchor as trained", "to the anchor at equal bytes",
             "step, × LoRA's", "peak, MB", "expansion, ms", "forgetting, ×", "runs")  # fmt: skip
    return _without_empty(Table(heads, tuple(rows), 2))


def findings(results: Results) -> list[str]:
    """What the tables of a data set say, in a sentence each."""
    best, metric = _best(results), results.metric
    if best is None:
        return [f"{results.data.name}: no adapter has a final run yet."]
    told = [f"{results.data.name}: {best.name} has the best mean, {wording.score(best.score(metric), metric)} "
            f"({wording.metric_name(metric)}), in {wording.size(best.bytes)} bytes."]  # fmt: skip
    gain = results.over_base(best)
    if results.base and gain and gain.half is not None and gain.mean <= gain.half:
        told.append(f"The seeds do not tell it from {results.base.name}.")
    found = summaries(results)
    rates = [(one.delta.percent, one) for one in found if one.delta and one.delta.percent is not None]
    if rates:
        percent, first = min(rates, key=lambda pair: (pair[0], pair[1].curve))
        fewer = f"{abs(percent):.0f} % {'fewer' if percent < 0 else 'more'} bytes"
        told.append(f"Of the curves that overlap with {results.anchor}, {first.curve} needs the fewest bytes at equal "
                    f"{wording.bare_name(metric)}: {fewer}.")  # fmt: skip
    elif results.anchor and any(one.delta for one in found):
        told.append(
            f"No curve can be compared with {results.anchor} at equal {wording.bare_name(metric)}; the table says why."
        )
    above = [one.curve for one in found if one.delta and "wholly better" in one.delta.reason]
    told += [f"Better at each of its points than {results.anchor} at any: {', '.join(above)}."] if above else []
    least = [(reach.bytes, one.curve) for one in found if (reach := one.reaches.get(SHARES[0])) and reach.bytes]
    if least:
        size, curve = min(least)
        told.append(f"95 % of the gain of {results.gain_of} takes the fewest bytes with {curve}: {wording.size(size)}.")
    elif any(one.reaches for one in found):
        told.append(f"No curve reaches 95 % of the gain of {results.gain_of}.")
    behind, data = results.behind_base(), results.data
    if behind and results.base:
        told.append(f"Behind {results.base.name} beyond the seeds: {', '.join(line.name for line in behind)}.")
        if data.trial_steps < data.steps:
            chosen = f"chosen in trials of {data.trial_steps} steps"
            told.append(f"Their learning rates, {chosen}, may be too high for {data.steps}.")
    return told


def as_csv(all_results: Sequence[Results]) -> str:
    """A line each row, data set and way to store it."""
    rows = [{"data": results.data.name, **_plain(results, line)} for results in all_results for line in results.lines]
    stream = io.StringIO()
    if rows:
        flat = [dict(_flat(row)) for row in rows]
        writer = csv.DictWriter(stream, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return stream.getvalue()


def as_json(study: Study, all_results: Sequence[Results], lacking: Sequence[str]) -> str:
    """All of it, with the value of every seed."""
    data = [
        {
            "name": results.data.name,
            "metric": results.metric,
            "higher_is_better": results.higher,
            "findings": findings(results),
            "rows": [_plain(results, line) | {"scores": line.scores} for line in results.lines],
            "curves": [asdict(one) for one in summaries(results)],
        }
        for results in all_results
    ]
    head = {"study": study.name, "title": study.title, "claim": study.claim.strip(), "seeds": study.seeds,
            "trials": study.trials, "anchor": study.anchor, "gain_of": study.gain_of}  # fmt: skip
    return json.dumps(head | {"data": data, "missing": list(lacking)}, indent=1, ensure_ascii=False) + "\n"


def _cells(results: Results, line: Line) -> tuple[str, ...]:
    metric, run = results.metric, line.as_trained and line.rate is not None
    runs = str(len(line.scores.get(metric, {}))) + (f" (+{line.diverged} diverged)" if line.diverged else "")
    return (
        line.name,
        wording.configuration(line.configuration, line.row.method) if line.as_trained else "",
        f"{line.coefficients:,}" if line.coefficients else "",
        wording.size(line.bytes) if line.bytes else "",
        wording.size(line.point.head_bytes) if line.point.head_bytes else "",
        wording.rate(line.rate, line.trials, at_edge=line.at_edge) if run else "",
        wording.score(line.score(metric), metric),
        wording.score(results.to_anchor(line), metric, signed=True),
        wording.score(results.at_equal_bytes(line), metric, signed=True),
        wording.times(results.step_ratio(line)) if run else "",
        wording.megabytes(line.peak_bytes) if run else "",
        wording.milliseconds(line.expand_seconds) if run else "",
        wording.ratio(interval(list(line.forgetting.values()))) if line.rate is not None else "",
        runs,
    )


def _best(results: Results) -> Line | None:
    """The adapter with the best mean, of equal ones the smallest."""
    sign = -1 if results.higher else 1
    scored = [
        (found.mean, line) for line in results.lines if line.row.adapted and (found := line.score(results.metric))
    ]
    return min(scored, key=lambda pair: (sign * pair[0], pair[1].bytes, pair[1].name), default=(0.0, None))[1]


def _plain(results: Results, line: Line) -> dict[str, Any]:
    """A line's values, for programs."""
    return {
        "row": line.row.name,
        "curve": line.row.curve,
        "method": line.row.method,
        "point": line.point.name,
        "bits": line.point.bits,
        "rank": line.point.rank,
        "configuration": line.configuration,
        "coefficients": line.coefficients,
        "bytes": line.bytes,
        "head_bytes": line.point.head_bytes,
        "rate": line.rate,
        "trials": line.trials,
        "rate_at_edge": line.at_edge,
        "metric": results.metric,
        "score": _values(line.score(results.metric)),
        "to_anchor": _values(results.to_anchor(line)),
        "at_equal_bytes": _values(results.at_equal_bytes(line)),
        "diverged": line.diverged,
        "step_seconds": line.step_seconds,
        "step_ratio": results.step_ratio(line),
        "peak_bytes": line.peak_bytes or None,
        "expand_seconds": line.expand_seconds,
        "forgetting": _values(interval(list(line.forgetting.values()))),
    }


def _values(found: Interval | None) -> dict[str, Any]:
    return {"mean": None, "half": None, "count": 0} if found is None else asdict(found)


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Columns: an interval is three, a configuration one of JSON."""
    for key, value in row.items():
        if key == "configuration":
            yield key, json.dumps(value, sort_keys=True, default=str)
        elif isinstance(value, dict):
            yield from ((f"{key}_{part}", one) for part, one in value.items())  # pyright: ignore[reportUnknownVariableType]
        else:
            yield key, value


def _without_empty(table: Table) -> Table:
    """Without the columns that say nothing in any row."""
    kept = [i for i in range(len(table.heads)) if i < table.left or any(row[i] for row in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return Table(tuple(table.heads[i] for i in kept), rows, table.left)
