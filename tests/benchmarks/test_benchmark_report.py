"""Tables stand between markers and are those of the rows; the page in the repository is up to date."""

from pathlib import Path

import pytest
from synthetic_rows import run_of

from benchmarks import bases, plan_cost, plots, report, rows
from benchmarks.__main__ import main
from benchmarks.adapters import FLOOR
from benchmarks.report import END, filled
from benchmarks.rows import Run
from benchmarks.tables import number, tables

PAGE = f"# A page\n\nBefore.\n\n<!-- table: step -->\nstale\n{END}\n\nAfter.\n"


def runs() -> list[Run]:
    step = {FLOOR: [0.100, 0.110, 0.120], "NOLA r=8 k=64": [0.150, 0.165, 0.180]}
    grown = {FLOOR: [0.01], "NOLA r=8 k=64": [0.02]}
    more = {FLOOR: [0.01], "NOLA r=8 k=128": [0.03]}
    return [
        run_of("step", step, name="step of M, 64 tokens", work=64, unit="tokens/s", parameters={"tokens": 64}),
        run_of("growth", grown, name="k 64", parameters={"axis": "k", "k": 64, "r": 8}),
        run_of("growth", more, name="k 128", parameters={"axis": "k", "k": 128, "r": 8}),
        run_of("memory", {"PEFT LoRA r=16": [1500.0], "RandLoRA r=32": [1536.0]}, quantity="MB"),
    ]


def test_what_is_between_the_markers_is_replaced_and_the_prose_stays() -> None:
    page = filled(PAGE, runs())
    assert page.startswith("# A page\n\nBefore.\n\n<!-- table: step -->\n")
    assert page.endswith(f"{END}\n\nAfter.\n")
    assert "stale" not in page
    assert "| NOLA r=8 k=64 | 165 | 156–174 | 1.5 | 1.5–1.5 | 55 | 388 |" in page
    assert filled(page, runs()) == page


def test_growth_is_a_table_an_axis() -> None:
    text = tables(runs())["growth"]()
    assert "| k | PEFT LoRA r=1, ms | NOLA, ms |" in text
    assert "| 64 | 10 | 20 |\n| 128 | 10 | 30 |" in text


def test_memory_is_in_megabytes_and_targets_say_met_missed_or_not_measured() -> None:
    assert "| RandLoRA r=32 | 1,536 | 1,536–1,536 | 1.02 |" in tables(runs())["memory"]()
    lines = tables(runs())["targets"]().splitlines()
    (memory,) = [line for line in lines if "peak memory of RandLoRA to that of PEFT LoRA" in line]
    assert "1.02 ×" in memory
    assert memory.endswith("| met |")
    assert sum(line.endswith("| not measured |") for line in lines) > 3


def test_what_plan_counts_stands_beside_what_was_timed() -> None:
    sides = {FLOOR: [1.0], "PEFT LoRA r=8": [1.2], "NOLA r=8 k=256": [1.1], "PEFT VeRA r=256": [1.3]}
    timed = run_of("step", sides, parameters={"model": "GPT-2 6×512", "tokens": 512})
    _, _, lora, nola = tables([*runs(), timed])["plan cost"]().splitlines()  # PEFT's VeRA is not planned
    assert lora.startswith("| GPT-2 6×512 | 512 | PEFT LoRA r=8 |")
    assert lora.endswith("| 1.20 | 1.20–1.20 |")
    assert nola.startswith("| GPT-2 6×512 | 512 | NOLA r=8 k=256 |")


def test_a_step_is_counted_as_by_hand() -> None:
    """A Llama of one width: 7 matrices a layer, the head, scores and sums of 128 tokens; LoRA thrice, layers twice."""
    base = bases.llama(2, 64, 512)
    kv, inner, head = 64 // 2, 64 * 11 // 4, 64 * 512  # half as many heads for keys and values
    shapes = [(64, 64), (kv, 64), (kv, 64), (64, 64), (inner, 64), (inner, 64), (64, inner)]
    layers = 2 * sum(out * in_ for out, in_ in shapes)
    attention = 2 * (2 * 128 * 64)
    lora = 2 * sum(out + in_ for out, in_ in shapes)
    assert plan_cost.counted(base, FLOOR, 256) == 256 * (2 * (layers + head) + 3 * attention + 3 * lora)


def test_cards_have_tables_of_their_own() -> None:
    cards = [run_of("gpu step", {"a": [0.1], "b": [0.2]}, name="step of M") for _ in range(2)]
    for run, card in zip(cards, ("NVIDIA H100", "NVIDIA H200"), strict=True):
        for row in run.rows:
            row["device"] = card
    text = tables(cards)["gpu step"]()
    first, second = text.split("**On an NVIDIA H200.**")
    assert first.startswith("**On an NVIDIA H100.**\n\nNVIDIA H100, ")
    assert second.strip().startswith("NVIDIA H200, ")
    assert first.count("**step of M**") == second.count("**step of M**") == 1


def test_a_table_without_rows_says_so() -> None:
    assert tables([])["step"]() == "No rows yet."


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (f"<!-- table: unknown -->\n{END}\n", "must name one of"),
        ("<!-- table: step -->\nnever closed\n", "must be closed"),
        (f"<!-- table: step -->\n<!-- table: step -->\n{END}\n", "must be closed"),
    ],
)
def test_a_marker_that_cannot_be_filled_is_refused(page: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filled(page, runs())


def test_numbers_have_three_digits() -> None:
    assert [number(value) for value in (0.0, 0.01234, 1.0, 99.94, 1234.5)] == ["0", "0.0123", "1", "99.9", "1,234"]


def test_a_picture_a_family_that_has_rows(tmp_path: Path) -> None:
    drawn = plots.draw(runs(), tmp_path)
    assert [path.name for path in drawn] == ["step.png", "memory.png", "growth.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_the_command_writes_pages_and_says_when_one_is_stale(tmp_path: Path) -> None:
    pages, timings = [tmp_path / "page.md", tmp_path / "another.md"], tmp_path / "timings.csv"
    for page in pages:
        page.write_text(PAGE, encoding="utf-8")
    for run in runs():
        rows.append(timings, run.rows)
    words = ["report", "--page", *map(str, pages), "--input", str(timings), "--pictures", str(tmp_path / "pictures")]
    assert main([*words, "--check"]) == 1
    assert main(words) == 0
    assert main([*words, "--check"]) == 0
    assert (tmp_path / "pictures" / "step.png").exists()
    pages[0].write_text(PAGE, encoding="utf-8")
    assert main([*words, "--check"]) == 1
    assert main(["report", "--page", str(tmp_path / "absent.md")]) == 2


def test_the_pages_in_the_repository_are_up_to_date() -> None:
    assert len(report.PAGES) == 5
    assert main(["report", "--check"]) == 0, "a page is stale: run `python -m benchmarks report`"
