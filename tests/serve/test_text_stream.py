"""Pieces of text against the text as a whole: characters stay whole, stop strings never show."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from randbasis.serve.text_stream import TextStream

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> Any:
    """With bytes where it has no word."""
    return AutoTokenizer.from_pretrained(data_dir / "llama_stories260k")


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode(errors="replace")


def pieces_of(
    tokenizer: Any, prompt: list[int], tokens: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, prompt, stop)
    found: list[str] = []
    for token in tokens:
        text, stopped = stream.add(token)
        found.append(text)
        if stopped:
            return found, True
    return [*found, stream.end()], False


TEXTS = [" there was a dog. It ran", " naïve café ☕ 漢字 👩‍👩‍👧 end", "\n\n  two  blanks ", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_whole_text(text: str, tokenizer: Any):
    prompt = tokenizer(PROMPT)["input_ids"]
    tokens = tokenizer(PROMPT + text)["input_ids"][len(prompt) :]
    whole = tokenizer.decode(prompt + tokens, skip_special_tokens=True)
    pieces, _ = pieces_of(tokenizer, prompt, tokens)
    assert "".join(pieces) == whole[len(PROMPT) :]
    assert not [piece for piece in pieces if "\ufffd" in piece]
    if "dog" in text:
        assert sum(map(bool, pieces)) > 3, "it comes as it is made"


@given(st.text(max_size=40), st.text(max_size=8))
def test_no_character_is_cut(text: str, before: str):
    pieces, _ = pieces_of(Bytes(), [*before.encode()], [*text.encode()])
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_ends_the_text_wherever_it_is_cut(text: str, stops: list[str]):
    pieces, stopped = pieces_of(Bytes(), [], [*text.encode()], tuple(stops))
    firsts = [place for stop in stops if (place := text.find(stop)) >= 0]
    assert stopped is bool(firsts)
    told = "".join(pieces)
    assert not any(stop in told for stop in stops)
    if not firsts:
        assert told == text
    else:
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        earliest = min(ends)  # the first that is complete ends it, as tokens come one by one
        begun = min(
            text.find(stop) for stop in stops if text.find(stop) >= 0 and text.find(stop) + len(stop) == earliest
        )
        assert told == text[:begun]


def test_what_may_begin_a_stop_string_is_held_back():
    stream = TextStream(Bytes(), [], ("END",))
    assert [stream.add(byte)[0] for byte in b"aENxEN"] == ["a", "", "", "ENx", "", ""]
    assert stream.end() == "EN"


def test_bytes_that_are_no_character_come_out_at_last():
    pieces, _ = pieces_of(Bytes(), [], [*b"a\xe2\x98"])
    assert "".join(pieces) == "a\ufffd"
