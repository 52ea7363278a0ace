"""Tables at the width of a window: no word is cut, whatever the names are."""

import re

import pytest
from rich.console import Console
from rich.table import Table

from randbasis.cli.console import answer
from randbasis.cli.tables import fitted, unbounded_width

NAMES = (
    "roberta.encoder.layer.11.attention.self.query",
    "base_model.model.model.layers.11.self_attn.qkv_proj[q]",
    "a/b.safetensors",
)
LONG = "model.a_very_long_piece_of_a_name_that_nothing_can_break_anywhere.11.q"


def table(*names: str) -> Table:
    made = Table(title="nola: r 4", caption="all", min_width=60)
    made.add_column("matrix")
    for header in ("out × in", "coefficients", "norm", "effective rank"):
        made.add_column(header, justify="right")
    for name in names:
        made.add_row(name, "11008 × 4096", "1,024", "0.1234", "not computed")
    return made


def lines(made: Table, width: int) -> list[str]:
    console = Console(width=width, force_terminal=True, color_system=None, markup=False)
    with console.capture() as captured:
        shown = fitted(console, made)
        console.print(shown, soft_wrap=isinstance(shown, str))
    return captured.get().splitlines()


def column(shown: list[str], number: int) -> str:
    """The cells of one column put together again: a name that was broken ends its lines with a dot or a slash."""
    return "\n".join(re.split("[│┃]", line)[number + 1].strip() for line in shown if line[:1] in "│┃")


@pytest.mark.parametrize("width", [80, 90, 120, 200])
def test_names_are_broken_behind_dots_alone(width: int):
    shown = lines(table(*NAMES), width)
    assert all(len(line) <= width for line in shown)
    assert any("│" in line for line in shown)
    assert re.sub(r"(?<=[./])\n|\n+$", "", column(shown, 0)).split() == ["matrix", *NAMES]
    assert {*column(shown, 2).split()} == {"coefficients", "1,024"}
    assert {*column(shown, 3).split()} == {"norm", "0.1234"}
    assert {*column(shown, 4).split()} == {"effective", "rank", "not", "computed"}


def test_what_fits_is_left_as_it_is():
    made = table(*NAMES)
    console = Console(width=200, markup=False)
    assert fitted(console, made) is made
    console.width = unbounded_width(console, made)
    assert fitted(console, made) is made
    console.width -= 1
    assert fitted(console, made) is not made


@pytest.mark.parametrize("width", [40, 80])
def test_where_words_do_not_fit_beside_each_other_they_stand_below(width: int):
    shown = lines(table(*NAMES, LONG), width)
    text = "\n".join(shown)
    assert re.sub(r"(?<=[./])\n", "", text).splitlines()[0] == "nola: r 4"
    for name in (*NAMES, LONG):
        assert name in re.sub(r"(?<=[./])\n", "", text)
    assert text.count("0.1234") == text.count("1,024") == len(NAMES) + 1
    assert shown[-1] == "all"
    pieces = {piece for line in shown for piece in line.split()}
    assert all(len(line) <= width for line in shown if not any(len(piece) > width for piece in line.split()))
    assert "coefficients" in pieces


def test_an_answer_keeps_digests_and_paths_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    digest, path = "ab" * 32, "/some/folder/with/a/name/that/is/longer/than/a/line/of/sixty/letters/model.safetensors"
    answer({"output": path, "digest": digest, "metrics": {"accuracy": 0.5, "loss": 0.25}}, as_json=False)
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert digest in shown
    assert path in re.sub(r"(?<=[./])\s+", "", shown)
    assert "accuracy 0.5000, loss 0.2500" in shown


def test_the_longest_column_gives_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    answer({"head_parameters": 3, "trained_on": "some words " * 9}, as_json=False)
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert shown[0].split() == ["head", "parameters", "3"]
    assert shown[1].startswith(" trained on       some words")
    assert all(len(line) <= 60 for line in shown)


def test_values_are_written_as_people_write_them(capsys: pytest.CaptureFixture[str]):
    answer({"a": [0.5, 1], "b": None, "c": True, "d": False, "e": [], "f": {}, "g": ["x"], "h": {"n": [1]}}, False)
    told = {line[:3].strip(): line[3:].strip() for line in capsys.readouterr().out.splitlines()}
    assert told == {
        "a": "0.5000, 1",
        "b": "none",
        "c": "yes",
        "d": "no",
        "e": "none",
        "f": "none",
        "g": "x",
        "h": "n 1",
    }
