"""The soak in short; and its judge, who must not take one adapter's answer for another's."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from randbasis.store import AdapterStore

FOLDER = Path(__file__).parent / "soak"
SUPPORT = Path(__file__).parents[1] / "support"


def test_a_short_soak_is_sound(tmp_path: Path, console_environment: dict[str, str]):
    command = [sys.executable, str(FOLDER / "run.py"), "--requests", "140", "--adapters", "60", "--clients", "6"]
    command += ["--seconds", "60", "--directory", str(tmp_path)]
    path = f"{SUPPORT}:{console_environment.get('PYTHONPATH', '')}"
    environment = console_environment | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-3000:]
    found = json.loads(done.stdout)
    bad = ("wrong", "failed", "lost", "slots_kept", "put_differs", "exit")
    assert not {name: found[name] for name in bad if found[name]}, done.stderr[-3000:]
    assert found["kills"] == 2
    for name in ("answered", "of_the_base", "of_a_version", "refused", "hung_up", "evictions", "put_checked"):
        assert found[name], name
    assert {"update", "damage", "damage new"} & set(found["changes"])
    # nearly every adapter answers in its own words, so that another's would be seen
    assert found["distinct_solo_answers"] > 0.9 * found["solo_answers"]


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The parts of it, and a world of three adapters."""
    monkeypatch.syspath_prepend(FOLDER)
    import clients
    import judge
    import oracle
    import world
    from transformers import AutoModelForCausalLM

    base = oracle.tiny_base(tmp_path / "tiny")
    made = world.World(tmp_path / "a.db", AutoModelForCausalLM.from_pretrained(base), 3, 0)
    found = SimpleNamespace(clients=clients, judge=judge, oracle=oracle, world=world, made=made)
    found.truth = oracle.Oracle(base, made.adapter)
    return found


def judged(soak: Any, said: int | None, *, sent: float = 1e9, status: int = 200, **options: Any) -> dict[str, Any]:
    """What is thought of an answer of a content to who asked for the first adapter."""
    prompt = soak.oracle.prompts(0)[3]
    text = " ".join(map(soak.oracle.word, soak.truth.answer(said, prompt)))
    given = {"name": next(iter(soak.made.courses)), "version": None, "finish": "length", **options}
    asked = soak.clients.Asked(
        prompt=prompt, sent=sent, first=sent, ended=sent, status=status, tokens=8, tries=1, text=text, **given
    )
    return soak.judge.judged([asked], soak.made, soak.truth).counts()


class TestTheJudge:
    def test_it_knows_the_right_answer(self, soak: Any):
        assert judged(soak, 1)["answered"] == 1
        assert judged(soak, None, name=None)["answered"] == 1

    def test_it_finds_the_answers_of_others(self, soak: Any):
        assert judged(soak, 2)["wrong"] == 1
        assert judged(soak, None)["wrong"] == 1
        assert judged(soak, 1, name=None)["wrong"] == 1
        assert judged(soak, 2, hangs_up=True)["wrong"] == 1

    def test_an_old_version_is_right_by_its_number_alone(self, soak: Any):
        name = next(iter(soak.made.courses))
        soak.made._add(name, damaged=False)
        assert judged(soak, 1)["wrong"] == 1
        assert judged(soak, 4)["answered"] == 1
        assert judged(soak, 1, version=1)["answered"] == 1
        assert judged(soak, 4, version=1)["wrong"] == 1

    def test_who_asked_before_a_change_may_meet_what_was_before(self, soak: Any):
        name = next(iter(soak.made.courses))
        soak.made._add(name, damaged=False)
        change = soak.made.courses[name].newest[-1]
        assert judged(soak, 1, sent=change.began - 1e-3)["answered"] == 1
        assert judged(soak, 4, sent=change.began - 1e-3)["wrong"] == 1

    def test_a_refusal_needs_its_reason(self, soak: Any):
        assert judged(soak, 1, status=404)["failed"] == 1
        assert judged(soak, 1, status=422)["failed"] == 1
        assert judged(soak, 1, status=503)["failed"] == 1
        soak.made._remove(next(iter(soak.made.courses)))
        assert judged(soak, 1, status=404)["refused"] == 1
        assert judged(soak, 1)["wrong"] == 1

    def test_what_is_lost_is_seen(self, soak: Any, tmp_path: Path):
        assert soak.made.lost() == []
        name = next(iter(soak.made.courses))
        with AdapterStore(tmp_path / "a.db") as store:
            store.remove(name)
        assert soak.made.lost() == [f"{name}@1"]
