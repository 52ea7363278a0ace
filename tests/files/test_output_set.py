"""Folders that are written as a set: failures at every move, kills at every move, and what is ours in a folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from randbasis.errors import AdapterFilesError, LocationError, OutputExistsError, SaveError
from randbasis.files.output_checks import check_output_file, check_output_folder
from randbasis.files.output_set import check_finished, replaced_set

OLD = {
    "adapter_config.json": "old",
    "adapter_model.safetensors": "old",
    "task.json": "old",
    "summary.json": "old",
    "README.md": "---\nlibrary_name: peft\n---\nold",
    "checkpoints/checkpoint-4/trainer_state.json": "old",
}
FOREIGN = {"notes.txt": "mine", "data/rows.csv": "mine", "tokenizer.json": "mine"}
NEW = {"adapter_config.json": "new", "adapter_model.safetensors": "new", "head.safetensors": "new"}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(output: Path, files: dict[str, str] = NEW, **options: Any) -> None:
    with replaced_set(output, **options) as stage:
        fill(stage, files)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    fill(tmp_path / "out", OLD | FOREIGN)
    return tmp_path / "out"


def test_ours_outside_of_the_new_set_go_and_others_stay(there: Path):
    write(there)
    assert contents(there) == NEW | FOREIGN
    assert sorted(path.name for path in there.parent.iterdir()) == ["out"]


def test_what_is_kept_stays_although_it_is_ours(there: Path):
    write(there, kept=("checkpoints",))
    kept = "checkpoints/checkpoint-4/trainer_state.json"
    assert contents(there) == NEW | FOREIGN | {kept: "old"}


def test_a_card_that_somebody_wrote_by_hand_stays(there: Path):
    (there / "README.md").write_text("# Mine\n")
    write(there)
    assert contents(there) == NEW | FOREIGN | {"README.md": "# Mine\n"}


def test_a_model_takes_the_place_of_adapters_and_of_older_shards(there: Path):
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    fill(there, dict.fromkeys([*shards, "config.json", "model.safetensors.index.json"], "old"))
    model = {"config.json": '{"merged_by": "randbasis"}', "model.safetensors": "new"}
    write(there, model, model=True)
    assert contents(there) == model | {name: text for name, text in FOREIGN.items() if name != "tokenizer.json"}
    write(there)
    assert contents(there) == NEW | {name: text for name, text in FOREIGN.items() if name != "tokenizer.json"}


def test_an_adapter_is_not_written_beside_a_model_of_others(there: Path):
    fill(there, {"config.json": "{}", "model.safetensors": "mine"})
    before = contents(there)
    with pytest.raises(OutputExistsError, match="a model that this package did not write"):
        check_output_folder(there, (), overwrite=True)
    assert check_output_folder(there, (), overwrite=True, model=True) == there
    assert contents(there) == before


def failing(real: Callable[..., None], at: int, error: BaseException) -> Callable[..., None]:
    """The call number ``at`` raises; all others do their work."""
    calls = 0

    def call(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        real(*args)

    return call


MOVES = 1 + 6 + 3 + 1
"""The journal in, six old names out, three new ones in, the journal out."""


@pytest.mark.parametrize("at", range(1, MOVES + 1))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "key"])
def test_a_failure_at_any_move_leaves_everything_as_it_was(
    at: int, error: BaseException, there: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "replace", failing(os.replace, at, error))
    with pytest.raises(SaveError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        write(there)
    assert contents(there) == OLD | FOREIGN
    assert sorted(path.name for path in there.iterdir()) == sorted({name.split("/")[0] for name in OLD | FOREIGN})
    assert isinstance(error, KeyboardInterrupt) or "what was there before is kept" in str(raised.value)
    monkeypatch.undo()
    write(there)
    assert contents(there) == NEW | FOREIGN


def test_there_are_no_more_moves_than_were_made_to_fail(there: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "replace", failing(os.replace, MOVES + 1, OSError(28, "one more")))
    write(there)
    assert contents(there) == NEW | FOREIGN


KILLED = """
import os, sys
from pathlib import Path
from randbasis.files.output_set import replaced_set
real, calls = os.replace, 0
def replace(*paths):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os._exit(9)
    real(*paths)
os.replace = replace
with replaced_set(Path(sys.argv[1])) as stage:
    for name in ("adapter_config.json", "adapter_model.safetensors", "head.safetensors"):
        (stage / name).write_text("new")
"""


@pytest.mark.parametrize("at", [1, 2, 5, 8, 9, 11])
def test_a_process_killed_at_any_move_leaves_no_mixture_and_is_undone_by_the_next(at: int, there: Path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(there), str(at)], check=False)
    assert done.returncode == 9
    found = {name: (there / name).read_text() for name in OLD.keys() | NEW.keys() if (there / name).is_file()}
    assert len({text.rpartition("\n")[2] for text in found.values()}) <= 1, "old and new files side by side"
    if at > 1:
        with pytest.raises(AdapterFilesError, match="was stopped while it replaced"):
            check_finished(there)

    def refused() -> None:
        with replaced_set(there) as stage:
            fill(stage, NEW)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 # any: the old set is back before the block begins
        refused()
    check_finished(there)
    left = {name: text for name, text in contents(there).items() if not name.startswith(".writing-")}
    assert left == OLD | FOREIGN


def test_files_that_cannot_be_put_back_are_told_where_they_are(there: Path, monkeypatch: pytest.MonkeyPatch):
    def full_from(at: int) -> Callable[..., None]:
        real, calls = os.replace, 0

        def call(*args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls >= at:
                raise OSError(5, "Input/output error")
            real(*args)

        return call

    monkeypatch.setattr(os, "replace", full_from(5))
    with pytest.raises(SaveError, match=r"nor could its files be put back.*\.replaced-set") as raised:
        write(there)
    assert "kept" not in str(raised.value)
    assert len(list((there / ".replaced-set" / "old").iterdir())) == 3
    monkeypatch.undo()
    write(there)
    assert contents(there) == NEW | FOREIGN | {k: v for k, v in contents(there).items() if k.startswith(".writing")}


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "replace", failing(os.replace, 1, OSError(28, "No space left on device")))
    with pytest.raises(SaveError, match="disk is full"):
        write(tmp_path / "deep" / "er" / "out")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "deep" / "er" / "out")
    assert contents(tmp_path / "deep" / "er" / "out") == NEW
    assert (tmp_path / "deep" / "er" / "out").stat().st_mode == (tmp_path / "deep").stat().st_mode


@pytest.mark.parametrize(
    ("output", "named"),
    [("runs/a", "for both"), ("runs", "must not contain"), ("runs/a/lora", "must not lie inside of"), (".", "contain")],
)
def test_an_output_that_is_contains_or_lies_in_a_source_is_refused(output: str, named: str, tmp_path: Path):
    fill(tmp_path / "runs" / "a", OLD)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    for root in (tmp_path, tmp_path / "link" / ".."):
        with pytest.raises(OutputExistsError, match=named):
            check_output_folder(root / output, (tmp_path / "runs" / "a",), overwrite=True)
    if output.startswith("runs"):
        with pytest.raises(OutputExistsError, match=named):
            check_output_folder(tmp_path / output.replace("runs", "link"), (tmp_path / "runs" / "a",), overwrite=True)
    assert contents(tmp_path / "runs" / "a") == OLD


def test_a_packed_file_in_its_output_is_a_source_too(there: Path):
    fill(there, {"packed.safetensors": "file"})
    with pytest.raises(OutputExistsError, match="must not contain"):
        check_output_folder(there, (there / "packed.safetensors",), overwrite=True)


def test_a_file_takes_no_part_of_what_is_read(there: Path):
    for name in ("adapter_model.safetensors", "task.json"):
        with pytest.raises(OutputExistsError, match="read from"):
            check_output_file(there / name, (there,), overwrite=True)
    check_output_file(there / "notes.txt", (there,), overwrite=True)
    check_output_file(there / "other.safetensors", (there,), overwrite=False)


@pytest.mark.parametrize("url", ["s3://bucket/folder", "memory://out", Path("s3://bucket/folder"), Path("hf://a/b")])
def test_a_folder_behind_a_url_is_refused_and_none_is_made_here(
    url: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LocationError, match="path of this machine"):
        check_output_folder(url, (), overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_file_urls_are_paths_of_this_machine(tmp_path: Path):
    for url in (f"file://{tmp_path}/out", Path(f"file://{tmp_path}/out")):
        assert check_output_folder(url, (), overwrite=False) == tmp_path / "out"
