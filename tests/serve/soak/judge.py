"""Each answer held against what the store may have meant by its name while it was under way."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from clients import Asked
from oracle import MAX_TOKENS, Oracle
from world import ABSENT, Meaning, World

SAMPLE = 50
"""Answers whose oracle is checked against PEFT's model."""
SHOWN = 10


@dataclass
class Verdicts:
    """What came of all requests.

    Attributes:
        counted: right, wrong, failed, ….
        firsts: seconds to the first token of each answer that was not sent twice.
        tokens: of all answers.
        checkable: contents and prompts that were answered.
    """

    counted: Counter[str] = field(default_factory=Counter[str])
    firsts: list[float] = field(default_factory=list[float])
    tokens: int = 0
    checkable: list[tuple[int, list[int]]] = field(default_factory=list[tuple[int, list[int]]])

    def counts(self) -> dict[str, Any]:
        names = ("requests", "answered", "of_the_base", "of_a_version", "refused", "hung_up", "sent_again", "ambiguous")
        times = sorted(self.firsts) or [0.0]
        return {
            **{name: self.counted[name] for name in (*names, "ties", "wrong", "failed")},
            "first_token_p50_ms": round(1000 * times[len(times) // 2], 1),
            "first_token_p99_ms": round(1000 * times[min(len(times) - 1, round(0.99 * len(times)))], 1),
        }

    def put_checked(self, oracle: Oracle) -> dict[str, int]:
        """How many solo answers were computed by PEFT's model as well, and how many differ beyond a tie."""
        sample = self.checkable[:: max(1, len(self.checkable) // SAMPLE)][:SAMPLE]
        differs = sum(not oracle.agrees(content, prompt, oracle.put(content, prompt))[0] for content, prompt in sample)
        return {"put_checked": len(sample), "put_differs": differs}


def judged(requests: Sequence[Asked], world: World, oracle: Oracle) -> Verdicts:
    """All of them."""
    found = Verdicts()
    for asked in requests:
        meant = (
            {Meaning(None)} if asked.name is None else world.meant(asked.name, asked.version, asked.sent, asked.ended)
        )
        verdict = _verdict(asked, meant, oracle, found)
        found.counted["requests"] += 1
        found.counted[verdict] += 1
        found.counted["of_the_base"] += asked.name is None
        found.counted["of_a_version"] += asked.version is not None
        found.counted["sent_again"] += asked.tries > 1
        found.counted["ambiguous"] += len(meant) > 1
        if asked.first is not None and asked.tries == 1:
            found.firsts.append(asked.first - asked.sent)
        found.tokens += asked.tokens
        if verdict in ("wrong", "failed") and found.counted["wrong"] + found.counted["failed"] <= SHOWN:
            print(f"{verdict}: {asked}, which may have met {meant}", file=sys.stderr)
    return found


def _verdict(asked: Asked, meant: set[Meaning], oracle: Oracle, found: Verdicts) -> str:
    """Right answers and refusals, wrong ones, and what failed for no reason."""
    if asked.status in (404, 422):
        expected = 404 if ABSENT in meant else 0, 422 if any(one.broken for one in meant) else 0
        return "refused" if asked.name is not None and asked.status in expected else "failed"
    if asked.status != 200:
        return "failed"
    # one that was resident before its bytes were damaged goes on to be served
    contents = [one.content for one in meant if one != ABSENT or asked.name is None]
    if asked.hangs_up:
        begins = [oracle.answer(content, asked.prompt)[: len(asked.answer)] == asked.answer for content in contents]
        return "hung_up" if any(begins) else "wrong"
    for content in contents:
        right, tie = oracle.agrees(content, asked.prompt, asked.answer)
        if right:
            found.counted["ties"] += tie
            if content is not None:
                found.checkable.append((content, asked.prompt))
            return "answered" if asked.finish == "length" and asked.tokens == MAX_TOKENS else "failed"
    return "wrong"
