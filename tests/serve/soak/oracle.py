"""What each adapter answers alone: one row at a time of a bank, checked against a model with that adapter on it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from served import Alone
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from randbasis.adapter_file import PackedAdapter
from randbasis.bank import AdapterBank

VOCABULARY = 256
PAGE = 16
"""Tokens of a block of the server's cache; prompts end before, at and behind its ends."""
LENGTHS = (1, 5, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1, 40)
MAX_TOKENS = 8
TIE = 1e-4
"""Below this part of the spread of the logits two of them are equal: a batch of another shape rounds otherwise."""


def tiny_base(folder: Path) -> str:
    """A random Llama whose words are its tokens."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    # what is no word is a token that the model cannot write: a decoder leaves special tokens out
    vocabulary = {word(token): token for token in range(VOCABULARY)} | {"<unk>": VOCABULARY}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return str(folder)


def word(token: int) -> str:
    return f"w{token}"


def prompts(seed: int) -> list[list[int]]:
    """Of several lengths; all begin alike, as prompts of one application do."""
    draws = torch.Generator().manual_seed(seed)
    longest = torch.randint(1, VOCABULARY, (max(LENGTHS),), generator=draws).tolist()
    return [longest[:length] for length in LENGTHS]


class Oracle:
    """Solo answers, each computed when it is first asked for.

    Args:
        base: folder of the model.
        adapter_of: seed → adapter.
    """

    def __init__(self, base: str, adapter_of: Callable[[int], PackedAdapter]):
        self._alone = Alone.of(base)
        self._adapter_of = adapter_of
        self.model: Any = LlamaForCausalLM.from_pretrained(base).eval()
        self._bank = AdapterBank(self.model)
        self._known: dict[tuple[int | None, tuple[int, ...]], tuple[list[int], list[float]]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def answer(self, content: int | None, prompt: Sequence[int]) -> list[int]:
        """Of an adapter, or of the base."""
        return self._solo(content, prompt)[0]

    def agrees(self, content: int | None, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[bool, bool]:
        """Whether an answer is this one's, and whether up to a tie alone."""
        expected, margins = self._solo(content, prompt)
        if list(tokens) == expected:
            return True, False
        differs = [one != other for one, other in zip(expected, tokens, strict=False)]
        tie = len(tokens) == len(expected) and margins[differs.index(True)] < TIE
        return tie, tie

    def put(self, content: int, prompt: Sequence[int]) -> list[int]:
        """The same of a model with the adapter put on it by PEFT."""
        return self._alone.tokens(self._adapter_of(content), prompt, MAX_TOKENS)

    def distinct(self) -> int:
        """How many of the known answers differ from every other one to the same prompt."""
        said = [(prompt, tuple(tokens)) for (_, prompt), (tokens, _) in self._known.items()]
        return sum(said.count(one) == 1 for one in set(said))

    def _solo(self, content: int | None, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
        key = content, tuple(prompt)
        if key not in self._known:
            self._known[key] = self._computed(content, prompt)
        return self._known[key]

    def _computed(self, content: int | None, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
        lease = None
        if content is not None:
            self._bank.load("one", self._adapter_of(content))
            lease = self._bank.lease("one")
        tokens, margins = [*prompt], list[float]()
        past: Any = None
        try:
            for _ in range(MAX_TOKENS):
                with torch.no_grad(), self._bank.rows([lease]):
                    given = torch.tensor([tokens if past is None else tokens[-1:]])
                    found = self.model(input_ids=given, past_key_values=past, use_cache=True)
                logits, past = found.logits[0, -1], found.past_key_values
                first, second = logits.topk(2).values.tolist()
                margins.append((first - second) / float(logits.std()))
                tokens.append(int(logits.argmax()))
        finally:
            if lease is not None:
                lease.release()
        return tokens[len(prompt) :], margins
