"""TABLES AND PICTURES → PAGES: one HTML file that needs nothing else, and Markdown with its pictures beside it."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from randbasis.compare.record import Record
from randbasis.compare.report import wording
from randbasis.compare.report.lines import Results
from randbasis.compare.report.picture import caption
from randbasis.compare.report.tables import Table, findings, line_table, summary_table
from randbasis.compare.study import LANGUAGE, Data, Study

READING = (
    "Scores are of the last step on the test rows: mean ± half the 95 % interval of Student's t over the seeds. A seed "
    "decides head, basis, order and draw of the rows, the same for every row of a table. Bold is the best mean.",
    "The learning rate of each row has the lowest loss on held-out rows; in brackets, how many were tried. A star "
    "marks the smallest or largest of them, so that a better one may lie outside.",
    "Bytes are those of the whole file: header, coefficients with their scales, head.",
    "“To the anchor” is the difference of the metric, paired by seed: to the anchor as it was trained, and to its "
    "curve at as many bytes (linear in log bytes between its points; empty outside of them).",
    "“Bytes at equal metric” is Bjøntegaard's delta rate: the average difference of log10 bytes over the range of the "
    "metric that both curves reach, by monotone cubic interpolation (PCHIP); negative is fewer. A curve that falls "
    "anywhere is taken by its envelope, the points that beat every smaller file, which favours a curve with many noisy "
    "points; the table says how many count. It is made of means, so it has no interval.",
    "Bytes to a share of the gain are interpolated on the same envelope; “≤” where the smallest file has it already.",
    "Steps are wall time on a machine that may have done other work, peak memory is the growth of the process over the "
    "loaded model: orders of magnitude. Expansion makes all factors once from the seed. Forgetting is the perplexity "
    "of the base's own text after training to that before.",
)


@dataclass(frozen=True)
class Report:
    """What a page says.

    Attributes:
        study: which.
        results: what came out on each data set, those without a line left out.
        records: the runs it is made of.
        lacking: a sentence for each row with fewer runs than it should have.
        pictures: files in the folder of pictures, the one that opens the page first.
        comments: prose in Markdown, beside the study file; empty for none.
    """

    study: Study
    results: Sequence[Results]
    records: Sequence[Record]
    lacking: Sequence[str]
    pictures: Sequence[Path]
    comments: str

    def provenance(self) -> str:
        """Runs, dates, versions and machines."""
        days = sorted({one.date for one in self.records})
        versions = sorted({f"{name} {number}" for one in self.records for name, number in one.versions.items()})
        machines = sorted({one.machine for one in self.records})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else "no run yet"
        return f"{len(self.records)} runs of `{self.study.name}.jsonl`; " + "; ".join(
            one for one in (when, ", ".join(versions), " and ".join(machines)) if one
        )  # fmt: skip

    def found(self) -> list[str]:
        """A paragraph a data set."""
        return [" ".join(findings(results)) for results in self.results]

    def tables(self, results: Results) -> list[Table]:
        """Of a data set: the summary, if there is one, and all lines."""
        return [table for table in (summary_table(results), line_table(results)) if table]

    def picture_of(self, results: Results) -> Path | None:
        """The data set's own picture, where it is not the one that opens the page."""
        return next((one for one in self.pictures[1:] if one.stem == results.data.stem), None)


def as_markdown(report: Report) -> str:
    """The page in Markdown, with links to the pictures."""
    study = report.study
    parts = [f"# {study.title}", "Written by `randbasis compare`; do not edit this page."]
    parts += [f"![{study.title}](pictures/{one.name})\n\n*{caption(report.results)}*" for one in report.pictures[:1]]
    if study.claim.strip():
        parts.append("**The claim.** " + " ".join(study.claim.split()))
    parts += [report.comments.strip()] if report.comments.strip() else []
    parts += ["**What the numbers say.**", *map(wording.untagged, report.found())]
    for results in report.results:
        parts += [f"## {wording.untagged(results.data.name)}", about(study, results.data)]
        picture = report.picture_of(results)
        parts += [f"![{results.data.name}](pictures/{picture.name})"] if picture else []
        parts += [table.markdown() for table in report.tables(results)]
    if report.lacking:
        parts += ["## Missing runs", "\n".join(f"- {wording.untagged(one)}" for one in report.lacking)]
    parts += ["## How to read this", "\n".join(f"- {one}" for one in READING), f"{report.provenance()}."]
    return "\n\n".join(parts) + "\n"


def as_html(report: Report) -> str:
    """The page as one file: pictures and style are in it, nothing is fetched, no script runs."""
    study, style = report.study, Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = [f"<h1>{escape(study.title)}</h1>"]
    body += [_figure(one, caption(report.results)) for one in report.pictures[:1]]
    if study.claim.strip():
        body.append(
            f"<blockquote><p><strong>The claim.</strong> {_inline(' '.join(study.claim.split()))}</p></blockquote>"
        )
    body.append(_prose(report.comments))
    body += ["<h2>What the numbers say</h2>", *(f"<p>{escape(one)}</p>" for one in report.found())]
    for results in report.results:
        body += [f"<h2>{escape(results.data.name)}</h2>", f'<p class="quiet">{_inline(about(study, results.data))}</p>']
        picture = report.picture_of(results)
        body += [_figure(picture, results.data.name)] if picture else []
        body += [_table(table) for table in report.tables(results)]
    if report.lacking:
        body += ["<h2>Missing runs</h2>", _items(report.lacking)]
    body += ["<h2>How to read this</h2>", _items(READING), f'<p class="quiet">{_inline(report.provenance())}.</p>']
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(study.title)}</title>\n<style>\n{style}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n'
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def about(study: Study, data: Data) -> str:
    """What a run on a data set is."""
    base, loop = data.base, data.base.loop
    unit = "prompts" if base.task == LANGUAGE else "test rows"
    tested = f"at most {base.data.eval_limit:,} {unit}, the same in all runs" if base.data.eval_limit else f"all {unit}"
    facts = [
        f"Model `{Path(base.model).name}`",
        f"targets {', '.join(data.targets)}",
        _training_rows(data, study.seeds),
        f"{data.steps} steps of {loop.batch_size}",
        f"{study.trials} learning rates a row, {data.trial_steps} steps each, scored on {data.dev_rows} held-out rows"
        + (" a class" if base.data.shots else ""),
        f"tested on {tested}",
        f"{study.seeds} seeds",
        f"metric {wording.metric_name(data.metric)}",
    ]
    return "; ".join(facts) + "."


def _training_rows(data: Data, seeds: int) -> str:
    rows = data.base.data
    if rows.shots:
        draws = min(seeds, data.sample_sets)
        return f"{rows.shots} examples a class, {draws} draw" + "s" * (draws > 1)
    return f"at most {rows.limit:,} training rows" if rows.limit else "all training rows"


def _figure(picture: Path, caption: str) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    told = escape(caption)
    return f'<figure><img alt="{told}" src="data:image/png;base64,{data}"><figcaption>{told}</figcaption></figure>'


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="word"' if i < table.left else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{_inline(c)}</{tag}>" for c, k in zip(cells, kinds, strict=True)) + "</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    return (
        f'<div class="wide"><table>\n<thead>{row(table.heads, "th")}</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'
    )


def _items(lines: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{_inline(one)}</li>" for one in lines) + "\n</ul>"


def _prose(text: str) -> str:
    """Paragraphs, lists and headings of the comments; other Markdown stays as it is written."""
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        heading = re.fullmatch(r"#+ +(.+)", block)
        if heading:
            blocks.append(f"<h2>{_inline(heading[1])}</h2>")
        elif block.startswith("- "):
            blocks.append(_items([" ".join(one.split()) for one in re.split(r"(?:^|\n)- ", block) if one]))
        elif block:
            blocks.append(f"<p>{_inline(' '.join(block.split()))}</p>")
    return "\n".join(blocks)


def _inline(text: str) -> str:
    """Code, bold and links; all else is text."""
    found = escape(text)
    found = re.sub(r"`([^`]+)`", r"<code>\1</code>", found)
    found = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", found)
    return re.sub(r"\[([^\]]+)\]\(((?:https?://|#|\.{0,2}/)?[\w./#?=&;%-]+)\)", r'<a href="\2">\1</a>', found)
