"""One user's keys and values never answer another: the same prompt at the borders of the cache's pages."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import Alone, Served, serving

from randbasis.adapter_file import PackedAdapter

BASE = "llama_stories260k"
PAGE = 16
NAMES = (BASE, "acme/b", "acme/c", "other/b")
LENGTHS = (PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE + 1)


def wrong_answers(served: Served, alone: Alone, users: dict[str, PackedAdapter]) -> list[tuple[str, int]]:
    """Name and length of each answer that is not that of the adapter alone; asked one by one and all at once."""
    story = alone.tokenizer("Once upon a time, there was a little girl named Lily. " * 6)["input_ids"]
    asked = [(name, length) for length in LENGTHS for name in NAMES] * 2
    expected = {(name, length): alone.tokens(users.get(name), story[:length], 8) for name, length in asked}
    client = served.openai()

    def ask(one: tuple[str, int]) -> bool:
        prompt = story[: one[1]]
        found = client.completions.create(model=one[0], prompt=prompt, max_tokens=8, temperature=0).choices[0].text
        whole = alone.tokenizer.decode(prompt + expected[one], skip_special_tokens=True)
        return found == whole[len(alone.tokenizer.decode(prompt, skip_special_tokens=True)) :]

    answers = [ask(one) for one in asked]
    with ThreadPoolExecutor(16) as pool:
        answers += pool.map(ask, asked)
    return [one for one, right in zip(asked * 2, answers, strict=True) if not right]


def test_the_same_prompt_of_two_users_and_the_base(served: Served, alone: Alone, users: dict[str, PackedAdapter]):
    assert wrong_answers(served, alone, users) == []


def test_with_shared_blocks_it_would_fail(base: str, store: Path, alone: Alone, users: dict[str, PackedAdapter]):
    """What transformers does by default, so that the test above can fail."""
    with serving(base, store, share_blocks=True) as shared:
        wrong = wrong_answers(shared, alone, users)
    assert {length for _, length in wrong} >= {PAGE + 1, 2 * PAGE, 3 * PAGE + 1}
    assert len({name for name, _ in wrong}) > 1


def test_no_option_of_the_command_shares_blocks():
    from randbasis.serve.batching import BatchSettings
    from randbasis.serve.settings import ServeSettings

    assert BatchSettings().share_blocks is False
    assert not [name for name in ServeSettings.__dataclass_fields__ if "share" in name]


@pytest.mark.parametrize("sizes", [{"max_batch_tokens": 16}, {"cache_tokens": 160}])
def test_split_prompts_and_a_full_cache(
    sizes: dict[str, int], base: str, store: Path, alone: Alone, users: dict[str, PackedAdapter]
):
    """Prompts that take several passes, and requests that are put off and begun anew, answer as alone."""
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    names = [BASE, *users] * 2
    expected = {name: alone.text(users.get(name), story, 40) for name in names}
    with serving(base, store, **sizes) as served:
        client = served.openai()

        def ask(name: str) -> str:
            return client.completions.create(model=name, prompt=story, max_tokens=40, temperature=0).choices[0].text

        def draw(name: str) -> str:
            asked = {"model": name, "prompt": story, "max_tokens": 40, "temperature": 1.2, "seed": 4}
            return client.completions.create(**asked).choices[0].text

        with ThreadPoolExecutor(16) as pool:
            assert dict(zip(names, pool.map(ask, names), strict=True)) == expected
            drawn = list(pool.map(draw, names))
        assert drawn == [draw(name) for name in names], "a seed gives the same also where a request is begun anew"
