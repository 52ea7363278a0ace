"""RECORDS → REPORT: a folder that a person reads (HTML, Markdown, pictures) and a program reads (CSV, JSON).

``lines`` takes the runs of a row together, ``measures`` compares, ``tables`` and ``picture`` show, ``page`` binds.
"""

from collections.abc import Sequence
from pathlib import Path

from randbasis.compare.record import Record
from randbasis.compare.report.lines import missing, results_of
from randbasis.compare.report.page import Report, as_html, as_markdown
from randbasis.compare.report.picture import draw
from randbasis.compare.report.tables import as_csv, as_json
from randbasis.compare.study import Study


def write_report(study: Study, records: Sequence[Record], folder: Path, comments: str = "") -> list[Path]:
    """Write ``report.html``, ``report.md`` with ``pictures/``, ``rows.csv`` and ``report.json``.

    The same records give the same bytes, in whatever order they were made.

    Args:
        study: what was compared.
        records: usable ones, in any order.
        folder: where the files go; it is made. Files of those names are replaced.
        comments: Markdown that stands under the claim.

    Returns:
        The files, those to read first.

    Raises:
        MissingPackageError: matplotlib or scipy is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(records, key=lambda one: (one.data, one.row, one.phase, one.rate, one.seed, one.date))
    results = [found for data in study.data if (found := results_of(study, data, ordered)).lines]
    lacking = missing(study, ordered)
    pictures = draw(study, results, folder / "pictures")
    report = Report(study, results, ordered, lacking, pictures, comments)
    texts = {
        "report.html": as_html(report),
        "report.md": as_markdown(report),
        "rows.csv": as_csv(results),
        "report.json": as_json(study, results, lacking),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [*(folder / name for name in texts), *pictures]
