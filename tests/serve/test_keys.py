"""Keys: what the file holds, who is found, what is refused, and when it is read again."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from randbasis.errors import KeysError
from randbasis.serve.keys import ANYBODY, KeyRing, add_key, make_key, read_keys, remove_key, write_keys
from randbasis.serve.limits import Rate, TokenBuckets


def test_the_file_has_hashes_and_is_its_owners_alone(tmp_path: Path):
    path = tmp_path / "keys.json"
    _, secret = add_key(path, "acme", ["acme/*"], "10/s", "read")
    _, other = add_key(path, "ops", ["*"], None, "admin")
    text = path.read_text()
    assert secret not in text
    assert secret[3:] not in text
    assert secret != other
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in read_keys(path)] == ["acme", "ops"]
    ring = KeyRing(path)
    assert (found := ring.find(secret)) is not None
    assert (found.name, found.role, found.rate) == ("acme", "read", Rate(10, 1.0, "10/s"))
    assert ring.find(other[:-1]) is None
    assert ring.find(None) is None
    assert ring.find("") is None


@pytest.mark.parametrize(
    ("pattern", "name", "may"),
    [
        ("acme/*", "acme/a", True),
        ("acme/*", "acme/a/b", True),
        ("acme/*", "acmes/a", False),
        ("acme/*", "ACME/a", False),
        ("acme/?", "acme/ab", False),
        ("*", "base", True),
        ("user-[12]", "user-2", True),
    ],
)
def test_patterns(pattern: str, name: str, may: bool):
    assert make_key("k", ["never", pattern])[0].may_use(name) is may


def test_a_key_counts_from_the_next_request_on_and_ends_with_the_next(tmp_path: Path):
    path = tmp_path / "keys.json"
    ring = KeyRing(path)
    assert not ring.needed
    assert ring.find(None) is ANYBODY
    _, secret = add_key(path, "acme", ["*"], None, "read")
    assert ring.needed
    assert ring.find(None) is None
    assert ring.find(secret) is not None
    remove_key(path, "acme")
    assert ring.find(secret) is None
    assert ring.find(None) is None, "a server whose last key went must not be open to all"
    assert KeyRing(path).find(None) is None, "nor after it was started again"
    path.unlink()
    assert ring.find(None) is None


def test_a_file_that_is_broken_leaves_the_keys_as_they_were(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "keys.json"
    _, secret = add_key(path, "acme", ["*"], None, "read")
    ring = KeyRing(path)
    path.write_text("{")
    assert ring.find(secret) is not None
    assert ring.find("other") is None
    assert "the keys stay as they were" in caplog.text
    with pytest.raises(KeysError, match="must be a file of keys"):
        KeyRing(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"keys": [{"name": "a"}]},
        {"keys": {}},
        {"keys": [{"name": "a b", "hash": "0" * 64, "adapters": ["*"], "role": "read"}]},
        {"keys": [{"name": "a", "hash": "0" * 63, "adapters": ["*"], "role": "read"}]},
        {"keys": [{"name": "a", "hash": "0" * 64, "adapters": [], "role": "read"}]},
        {"keys": [{"name": "a", "hash": "0" * 64, "adapters": [3], "role": "read"}]},
        {"keys": [{"name": "a", "hash": "0" * 64, "adapters": ["*"], "role": "root"}]},
        {"keys": [{"name": "a", "hash": "0" * 64, "adapters": "acme/*", "role": "read"}]},
        {"keys": [{"name": "a", "hash": "0" * 64, "adapters": ["*"], "role": "read", "rate": "fast"}]},
        {"keys": [{"name": "a", "hash": "0" * 64, "adapters": ["*"], "role": "read"}] * 2},
    ],
)
def test_a_file_that_is_none_is_refused(change: dict[str, object], tmp_path: Path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"format": 1, "keys": [], **change}))
    if change == {"keys": {}}:
        assert read_keys(path) == ()
        return
    with pytest.raises(KeysError):
        read_keys(path)


@pytest.mark.parametrize("options", [("", ["*"]), ("a/b", ["*"]), ("a", []), ("a", [""])])
def test_what_no_key_can_be(options: tuple[str, list[str]]):
    with pytest.raises(KeysError):
        make_key(*options)


def test_a_name_is_there_once(tmp_path: Path):
    path = tmp_path / "keys.json"
    add_key(path, "acme", ["*"], None, "read")
    before = path.read_bytes()
    with pytest.raises(KeysError, match="name must be new"):
        add_key(path, "acme", ["*"], None, "read")
    with pytest.raises(KeysError, match="did you mean acme"):
        remove_key(path, "acm")
    assert path.read_bytes() == before


def test_a_file_that_was_open_to_all_is_closed_when_it_is_written(tmp_path: Path):
    path = tmp_path / "keys.json"
    path.write_text('{"format": 1, "keys": []}')
    os.chmod(path, 0o644)
    write_keys(path, [make_key("a", ["*"])[0]])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(("text", "count", "seconds"), [("10/s", 10, 1), ("100/min", 100, 60), ("7/h", 7, 3600)])
def test_rates(text: str, count: int, seconds: float):
    assert Rate.parse(text) == Rate(count, seconds, text)


@pytest.mark.parametrize("text", ["", "10", "0/s", "-1/s", "1.5/s", "10/day", "10/s ", "a/s"])
def test_what_no_rate_can_be(text: str):
    with pytest.raises(KeysError, match="rate must be"):
        Rate.parse(text)


def test_a_bucket_fills_at_its_rate():
    now = 0.0
    buckets, rate = TokenBuckets(lambda: now), Rate.parse("2/s")
    assert [buckets.take("a", rate) for _ in range(2)] == [0, 0]
    assert buckets.take("a", rate) == pytest.approx(0.5)
    assert buckets.take("b", rate) == 0, "each key has its own"
    now = 0.25
    assert buckets.take("a", rate) == pytest.approx(0.25)
    now = 0.5
    assert buckets.take("a", rate) == 0
    now = 100.0
    assert [buckets.take("a", rate) > 0 for _ in range(3)] == [False, False, True], "never more than the rate at once"
    assert buckets.take("a", None) == 0


def test_two_that_add_keys_at_once_lose_none(tmp_path: Path):
    path = tmp_path / "keys.json"
    code = (
        "import sys; from pathlib import Path; from randbasis.serve.keys import add_key\n"
        "for i in range(20): add_key(Path(sys.argv[1]), f'{sys.argv[2]}{i}', ['*'], None, 'read')"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b")]
    assert [one.wait(60) for one in both] == [0, 0]
    assert {one.name for one in read_keys(path)} == {f"{name}{i}" for name in "ab" for i in range(20)}


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path):
    with pytest.raises(KeysError, match="the folder is there"):
        add_key(tmp_path / "nothing" / "keys.json", "a", ["*"], None, "read")
