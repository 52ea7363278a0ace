"""The report as files: same bytes from the same records, every number where it belongs, nothing fetched."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_records import ROWS, complete, data_of, point, record, shuffled, study_of, trials

from randbasis.compare.report import write_report
from randbasis.compare.report.lines import results_of
from randbasis.compare.report.page import about
from randbasis.compare.report.picture import DOTS, caption, styles_of
from randbasis.compare.report.tables import Table, findings, line_table, summaries, summary_table
from randbasis.compare.study import Row, Study
from randbasis.compare.study_file import read_study

STUDY = study_of(ROWS)
TWO = study_of(ROWS, [data_of("words"), data_of("E2E, tiny", "loss", "causal-lm")])


def cells(table: Table | None, head: str) -> dict[str, str]:
    assert table is not None
    at = table.heads.index(head)
    return {row[0]: row[at] for row in table.rows}


def results(study: Study, records: list):
    return results_of(study, study.data[0], records)


# --- tables ---


def test_the_summary_by_hand():
    """NOLA's curve is LoRA's at half the bytes; 95 % of the gain from .51 to .91 is .89."""
    found = results(STUDY, complete(STUDY))
    nola = next(one for one in summaries(found) if one.curve == "NOLA")
    assert nola.delta is not None
    assert nola.delta.percent == pytest.approx(-50)
    lora = next(one for one in summaries(found) if one.curve == "LoRA")
    for share in (0.95, 0.99):
        half, whole = nola.reaches[share].bytes, lora.reaches[share].bytes
        assert half is not None
        assert whole is not None
        assert half == pytest.approx(whole / 2)
        assert 1_000 < whole < 10_000
    table = summary_table(found)
    assert cells(table, "bytes at equal metric") == {"LoRA": "anchor", "NOLA": "−50 %"}
    assert cells(table, "over accuracy, %") == {"LoRA": "", "NOLA": "61.0 to 91.0"}
    assert cells(table, "points on envelope")["NOLA"] == "3 of 4"


def test_lines_say_means_intervals_rates_and_differences():
    table = line_table(results(STUDY, complete(STUDY)))
    assert cells(table, "accuracy, %")["LoRA"] == "91.0 ± 2.5"
    assert cells(table, "accuracy, %")["NOLA 256 B"] == "**91.0 ± 2.5**"  # as good as LoRA in fewer bytes
    assert cells(table, "rate (tried)")["LoRA"] == "0.0316 (3)"
    assert cells(table, "to the anchor as trained")["NOLA 64 B"] == "−10.0 ± 0.0"
    assert cells(table, "to the anchor at equal bytes")["NOLA 64 B"] == "+6.0 ± 0.0"
    assert cells(table, "step, × LoRA's")["NOLA 64 B"] == "2.00"
    assert cells(table, "file, bytes")["full fine-tuning"] == "90,000"
    assert "forgetting, ×" not in table.heads
    assert cells(table, "runs")["LoRA"] == "3"


def test_a_star_at_the_edge_and_what_diverged():
    lora = ROWS[2]
    runs = [*trials(lora, {0.0316: 0.1, 0.1: 0.2}), record(lora, [point(9, 0.5)], 0), record(lora, [], 1)]
    table = line_table(results(STUDY, runs))
    assert cells(table, "rate (tried)")["LoRA"] == "0.0316* (2)"
    assert cells(table, "runs")["LoRA"] == "1 (+1 diverged)"


def test_no_anchor_and_no_gain_is_no_summary():
    study = study_of(ROWS, anchor=None, gain_of=None)
    found = results(study, complete(study))
    assert summary_table(found) is None
    assert not [head for head in line_table(found).heads if "anchor" in head]
    assert len(findings(found)) == 1


def test_findings_name_the_winner_and_what_cannot_be_compared():
    told = findings(results(STUDY, complete(STUDY)))
    assert told[0] == "words: NOLA 256 B has the best mean, 91.0 ± 2.5 (accuracy, %), in 5,000 bytes."
    assert "NOLA needs the fewest bytes at equal accuracy: 50 % fewer bytes" in told[1]
    assert told[2].startswith("95 % of the gain of LoRA takes the fewest bytes with NOLA:")
    runs = [one for one in complete(STUDY) if one.row != "NOLA 256 B" or one.phase == "trial"]
    single = [record(ROWS[4], [point(5, 0.99)], seed) for seed in range(3)]
    alone = study_of([*ROWS[:3], ROWS[4]])
    told = findings(results(alone, [*runs, *single]))
    assert "No curve can be compared with LoRA at equal accuracy; the table says why." in told
    assert findings(results(STUDY, complete(STUDY)[:4])) == ["words: no adapter has a final run yet."]


def test_a_winner_that_the_seeds_do_not_tell_from_the_base_is_no_winner():
    apart = [
        record(row, [point(90, 0.5 + seed / 100 + (row is ROWS[2]) / 10)], seed) for row in ROWS for seed in range(3)
    ]
    assert "tell" not in findings(results(STUDY, apart))[1]
    level = [
        record(row, [point(90, 0.5 + (row is ROWS[2]) * (seed - 0.9) / 10)], seed) for row in ROWS for seed in range(3)
    ]
    assert findings(results(STUDY, level))[1] == "The seeds do not tell it from frozen + head."


def test_a_curve_above_all_of_the_anchor_is_told():
    better = [record(row, [point(50 + i, 0.97 + i / 100)], s) for s in range(3) for i, row in enumerate(ROWS[3:])]
    runs = [one for one in complete(STUDY) if one.curve != "NOLA"]
    assert "Better at each of its points than LoRA at any: NOLA." in findings(results(STUDY, [*runs, *better]))


@pytest.mark.parametrize(("metric", "task", "worse", "level"), [
    ("accuracy", "sequence-classification", 0.30, 0.50), ("loss", "sequence-classification", 0.90, 0.50),
    ("bleu", "causal-lm", 0.30, 0.51),
])  # fmt: skip
def test_a_row_that_training_harmed_is_named_with_the_length_of_its_trials(
    metric: str, task: str, worse: float, level: float
):
    data = data_of("words", metric, task)
    runs = [record(ROWS[0], [point(48, 0.5, metric=metric)], seed) for seed in range(3 if data.has_head else 1)]
    for row, score in ((ROWS[2], level), (ROWS[3], worse)):
        runs += [record(row, [point(99, score + 0.01 * seed, metric=metric)], seed) for seed in range(3)]
    told = ["Behind frozen + head beyond the seeds: NOLA 64 B.",
            "Their learning rates, chosen in trials of 60 steps, may be too high for 200."]  # fmt: skip
    assert findings(results(study_of(ROWS[:4], [data]), runs))[-2:] == told
    as_long = replace(data, trial_steps=200)
    assert findings(results(study_of(ROWS[:4], [as_long]), runs))[-1] == told[0]
    single = [one for one in runs if one.seed == 0]
    assert not [one for one in findings(results(study_of(ROWS[:4], [data]), single)) if one.startswith("Behind")]


def test_a_bar_in_a_name_does_not_split_a_cell():
    assert Table(("a", "b"), (("x|y", "1"),), 1).markdown() == "| a | b |\n|---|---:|\n| x\\|y | 1 |"


# --- files ---


def test_the_same_records_give_the_same_bytes_in_any_order(tmp_path: Path):
    records = complete(TWO)
    first = write_report(TWO, records, tmp_path / "a", "It held.")
    second = write_report(TWO, shuffled(records), tmp_path / "b", "It held.")
    assert [one.relative_to(tmp_path / "a") for one in first] == [one.relative_to(tmp_path / "b") for one in second]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    assert [one.name for one in first] == [
        "report.html", "report.md", "rows.csv", "report.json", "all.png", "words.png", "e2e-tiny.png"
    ]  # fmt: skip


def test_csv_and_json_hold_every_row_and_point(tmp_path: Path):
    write_report(STUDY, complete(STUDY), tmp_path)
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 + 1 + 3 + 2 + 2
    (one,) = (row for row in rows if row["row"] == "NOLA 64 B" and row["point"] == "4 bits")
    assert (one["bytes"], one["head_bytes"], one["score_count"]) == ("50.0", "40", "3")
    assert float(one["score_mean"]) == pytest.approx(0.61)
    assert json.loads(one["configuration"]) == {"rank": 4, "alpha": 8.0}
    whole = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    (data,) = whole["data"]
    assert [row["row"] for row in data["rows"]] == [row["row"] for row in rows]
    assert data["rows"][2]["scores"]["accuracy"] == pytest.approx({"0": 0.9, "1": 0.91, "2": 0.92})
    assert (whole["anchor"], whole["trials"], whole["missing"]) == ("LoRA", 3, [])


class Page(HTMLParser):
    """Tags that are open, what could be fetched, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "srcset", "data") and value]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(tmp_path: Path):
    write_report(TWO, complete(TWO), tmp_path, "**It held**, `so`.\n\n## Surprise\n\n- one\n- <two>")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.fetched) == 3
    assert all(one.startswith("data:image/png;base64,") for one in page.fetched)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "<strong>It held</strong>, <code>so</code>." in text
    assert "<h2>Surprise</h2>" in text
    assert "<li>&lt;two&gt;</li>" in text
    assert "table 2: <code>it</code> &lt;holds&gt; &amp; more." in text
    assert "prefers-color-scheme: dark" in text


def test_the_page_opens_with_picture_claim_and_comments(tmp_path: Path):
    comments = "It *held*; see [there](../x.md).\n\n| a |\n|---|\n"
    write_report(TWO, complete(TWO), tmp_path, comments)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    places = [
        text.index(one) for one in ("](pictures/all.png)", "**The claim.**", comments.strip(), "What the numbers")
    ]
    assert places == sorted(places)
    for name in re.findall(r"\]\((pictures/[^)]+)\)", text):
        assert (tmp_path / name).is_file()


def test_links_of_comments_are_no_scripts(tmp_path: Path):
    write_report(STUDY, complete(STUDY), tmp_path, "[a](javascript:alert(1)) [b](https://example.org/x?y=1) <script>")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'href="([^"]*)"', text) == ["https://example.org/x?y=1"]
    assert "<script" not in text


def test_what_is_missing_is_named_and_nothing_is_invented(tmp_path: Path):
    runs = [one for one in complete(STUDY) if one.row != "NOLA 256 B"]
    write_report(STUDY, runs, tmp_path)
    for name in ("report.md", "report.html"):
        assert "words, NOLA 256 B: no run yet" in (tmp_path / name).read_text(encoding="utf-8")
    assert "NOLA 256 B" not in (tmp_path / "rows.csv").read_text(encoding="utf-8")


def test_a_study_without_runs_is_a_page_that_says_so(tmp_path: Path):
    written = write_report(STUDY, [], tmp_path)
    assert [one.name for one in written] == ["report.html", "report.md", "rows.csv", "report.json"]
    assert "words, LoRA: no run yet" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_what_a_run_is_names_no_more_than_was_used(root: Path):
    study = read_study(root / "studies" / "fewshot.toml", must_exist=False)
    images = study.data[0]
    assert (study.seeds, images.sample_sets) == (3, 5)
    assert "10 examples a class, 3 draws;" in about(study, images)
    assert "10 examples a class, 5 draws;" in about(replace(study, seeds=7), images)
    assert "1 draw;" in about(study, replace(images, sample_sets=1))
    assert "tested on at most 500 test rows, the same in all runs;" in about(study, images)


# --- pictures ---


def test_curves_of_the_shipped_studies_are_told_apart_without_colour_alone(root: Path):
    for path in sorted((root / "studies").glob("*.toml")):
        styles = styles_of(read_study(path, must_exist=False))
        looks = [(one.colour, one.marker, one.dash) for one in styles.values()]
        assert len(set(looks)) == len(looks), path.name
        if len(looks) <= 14:
            assert len({one.marker for one in styles.values()}) == len(looks), path.name


def test_a_picture_shows_both_curves_and_nothing_of_who_drew_it(tmp_path: Path):
    *_, path = write_report(STUDY, complete(STUDY), tmp_path)
    with Image.open(path) as picture:
        assert picture.info.keys() <= {"dpi"}
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(0, 0, 0), (0x00, 0x72, 0xB2)} <= colours


def test_equal_sizes_are_drawn_as_dots(tmp_path: Path):
    study = study_of([ROWS[0], *(Row(f"NOLA law {i}", f"NOLA law {i}", "nola") for i in range(3))], anchor=None)
    runs = [record(row, [point(90, 0.5 + seed / 100)], seed) for row in study.rows for seed in range(3)]
    assert caption([results(study, runs)]) == DOTS
    *_, path = write_report(study, runs, tmp_path)
    assert (path.name, path.stat().st_size > 5_000) == ("words.png", True)


def test_names_of_files_are_plain():
    data = study_of([ROWS[0]]).data[0]
    names = ("E2E, stories260k", "SST-2", "../..")
    assert [replace(data, name=one).stem for one in names] == ["e2e-stories260k", "sst-2", "data"]


def test_names_are_drawn_and_written_as_they_are(tmp_path: Path):
    name = r"LoRA $x^{ $y <script> [/b] \u2028"
    rows = [ROWS[0], Row(name, name, "lora", points=ROWS[1].points)]
    study = study_of(rows, anchor=None, gain_of=None)
    runs = [record(row, [point(90, 0.5), point(60, 0.4, "4 bits")], seed) for row in rows for seed in range(2)]
    written = {path.name: path for path in write_report(study, runs, tmp_path)}
    assert "&lt;script>" in written["report.md"].read_text()
    assert "<script>" not in written["report.md"].read_text() + written["report.html"].read_text()
