"""`make first-hour` tells of what fails: the runner on commands of its own. The first hour itself takes minutes."""

from pathlib import Path

import pytest
from commands import HOUR, Ran, Step
from run import run_all


def told(steps: list[Step], folder: Path, capsys: pytest.CaptureFixture[str], **given: bool) -> tuple[int, str]:
    code = run_all(steps, folder, data=given.get("data", True))
    return code, capsys.readouterr().out


def test_progress_tells_number_time_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    steps = [Step("echo '{\"a\": 1}'", lambda ran: ran.json["a"] == 1), Step("cat made", first="echo 2 > made")]
    code, out = told(steps, tmp_path, capsys)
    assert code == 0
    assert "  1/2 " in out
    assert "cat made" in out
    assert "2 commands" in out


@pytest.mark.parametrize(
    "step",
    [
        Step("exit 3"),
        Step("true", exits=3),
        Step("echo 1", lambda ran: ran.out == "2\n"),
        Step("echo nothing", lambda ran: ran.json["a"] == 1),
        Step("true", first="exit 1"),
    ],
)
def test_a_failure_is_told_and_the_rest_still_runs(step: Step, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, out = told([step, Step("echo after > after")], tmp_path, capsys)
    assert code == 1
    assert "FAILED" in out
    assert (tmp_path / "after").is_file()


def test_what_needs_data_is_skipped_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, out = told([Step("exit 1", data=True), Step("true")], tmp_path, capsys, data=False)
    assert code == 0
    assert "skipped: RANDBASIS_DATA" in out


def test_a_command_that_hangs_on_input_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, _ = told([Step("cat", lambda ran: ran.out == "")], tmp_path, capsys)
    assert code == 0


def test_there_are_as_many_commands_as_are_told():
    assert len(HOUR) >= 40
    assert sum(step.check is not None for step in HOUR) >= 30
    assert len({step.command for step in HOUR}) == len(HOUR)


def test_ran_tells_what_was_no_json():
    with pytest.raises(ValueError, match="no JSON"):
        _ = Ran("", "text", "", Path()).json
