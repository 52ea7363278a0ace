"""All studies to one page: tables and pictures from the raw rows, comments from the prose that lies beside them."""

from pathlib import Path

from benchmarks.tables import span
from randbasis.train.default_choices import SCHEDULE
from studies.plots import plot_study
from studies.pool import read_records
from studies.study import Record, Setting, Study, usable
from studies.tables import table_of

INTRODUCTION = """\
# Results

Written by `python -m studies report` from the raw rows in `benchmarks/results/*.jsonl`, one line a run, and
the comments beside them in `benchmarks/results/*.md`. Do not edit this page.

How to read the tables:

- Every row of a table adapts the same matrices and is trained on the same examples in as many steps. A row's rank or
  basis is computed from its budget, in units of what LoRA of rank 1 has on those matrices.
- **coefficients** are the trained numbers of the adapter, without its head; **file** is what is saved, head included.
- **rate** is the learning rate of the adapter that the sweep chose, on rows held out from training, with one seed.
  Every row had equally many candidates, half a decade apart; a star marks the smallest or largest of them.
  The head's rate was chosen in the row of the frozen base and is the same in all rows of a table.
- **bits** are those of a coefficient: PTQ quantizes what the row in full precision has trained, QAT trains at few bits.
  **stored** is the bytes of the codes with four bytes for each scale, without header and head.
- Scores are of the last step, never of the best one: mean ± sample standard deviation over the runs. A run's seed
  decides its head, its basis, the order of the rows and, where there are several draws of the examples, the draw.
  Bold is the best mean.
- **s** is processor time of training on one thread, on a machine that did other work at the time: orders of magnitude.
"""


def write_report(studies: list[Study], results: Path, page: Path) -> None:
    """Write the page and its pictures.

    Args:
        studies: in the order of the page; one without final runs is left out.
        results: folder of the raw rows and of the comments.
        page: the Markdown file; pictures go into a folder of the same name beside it.
    """
    pictures = page.with_suffix("")
    parts = [INTRODUCTION]
    for study in studies:
        records = usable(study, read_records(results / f"{study.name}.jsonl"))
        if not any(record.job.phase == "final" for record in records):
            continue
        plot_study(study, records, pictures / f"{study.name}.png")
        parts.append(_section(study, records, results, f"{pictures.name}/{study.name}.png"))
    page.write_text("\n".join(parts), encoding="utf-8")


def _section(study: Study, records: list[Record], results: Path, picture: str) -> str:
    tables = [
        f"### {setting.name}\n\n{_about(study, setting)}\n\n{table_of(study, setting, records)}\n"
        for setting in study.settings
    ]
    prose = results / f"{study.name}.md"
    comments = [prose.read_text(encoding="utf-8")] if prose.exists() else []
    return "\n".join(
        [f"## {study.title}\n", _provenance(study, records), *tables, f"![{study.title}]({picture})\n", *comments]
    )


def _provenance(study: Study, records: list[Record]) -> str:
    versions = sorted({f"{name} {number}" for record in records for name, number in record.versions.items()})
    when = span(record.date for record in records)
    return f"Command: `make results-{study.name}`. {when}; {', '.join(versions)}; CPU.\n"


def _about(study: Study, setting: Setting) -> str:
    """What a run of this table is, from the setting itself."""
    base, loop = setting.base, setting.base.loop
    facts = [
        f"model `{Path(base.model).name}`",
        f"targets {', '.join(setting.targets)}",
        f"{base.data.shots} images a class, {setting.sample_sets} draws"
        if base.data.shots
        else f"at most {base.data.limit:,} training rows",
        f"{loop.max_steps} steps of {loop.batch_size}, {loop.schedule or SCHEDULE} schedule",
        f"{base.image_size} px" if base.image_size else f"at most {base.max_length} tokens",
        _sweep_words(study, setting),
        f"tested on {base.data.eval_limit or 'all'} {_unit(setting)}",
        f"seeds 0 to {setting.seeds - 1}",
    ]
    return "; ".join(facts) + "."


def _unit(setting: Setting) -> str:
    return "images of the test split" if setting.base.data.shots else "prompts" if not setting.has_head else "test rows"


def _sweep_words(study: Study, setting: Setting) -> str:
    if setting.rates_of is not None:
        return f"learning rates of “{setting.rates_of}”"
    counts = {len(setting.rates_for(row)) for row in study.rows if row.adapted}
    rows = f"{setting.dev_rows} held-out rows" + (" a class" if setting.base.data.shots else "")
    chosen = "learning rates in full precision as chosen above, at few bits by a " if 1 in counts else ""
    return f"{chosen}sweep over {max(counts)} rates, {setting.sweep_steps} steps each, scored on {rows}"
