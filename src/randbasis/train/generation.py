"""Texts from prompts: greedy, beam search or sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from randbasis.errors import SettingError
from randbasis.train.classification import pad_batch, pad_id
from randbasis.train.randomness import confined_randomness
from randbasis.train.task import inference


@dataclass(frozen=True)
class GenerationSettings:
    """How a text is chosen; the default is greedy.

    Args:
        max_new_tokens: ``None``: the longest target seen in training.
        beams: beams of a beam search.
        length_penalty: exponent of the length in a beam's score.
        sample: draw from the distribution instead of taking the most probable.
        temperature: of the distribution.
        top_k: draw among that many tokens, 0 for all.
        top_p: draw among the fewest tokens of that probability.
        repetition_penalty: above 1 makes tokens that were used less probable.
        seed: of the sampling.
    """

    max_new_tokens: int | None = None
    beams: int = 1
    length_penalty: float = 1.0
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            SettingError: a value is out of range; the message names it.
        """
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise SettingError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.beams < 1 or self.top_k < 0 or not 0 <= self.seed < 2**32:
            raise SettingError(
                f"beams must be at least 1, top_k at least 0, seed in [0, 2**32); got {self.beams}, "
                f"{self.top_k}, {self.seed}"
            )
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise SettingError(
                f"temperature and repetition_penalty must be above 0 and top_p in (0, 1]; got "
                f"{self.temperature}, {self.repetition_penalty}, {self.top_p}"
            )

    def for_transformers(self, room: int) -> dict[str, Any]:
        """The arguments of ``generate`` where ``room`` tokens are left."""
        chosen: dict[str, Any] = {
            "max_new_tokens": min(self.max_new_tokens or 128, room),
            "num_beams": self.beams,
            "do_sample": self.sample,
            "repetition_penalty": self.repetition_penalty,
            "use_cache": True,
        }
        if self.beams > 1:
            chosen["length_penalty"] = self.length_penalty
        if self.sample:
            chosen |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return chosen


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    *,
    end_id: int,
    batch_size: int,
    longest: int,
) -> list[str]:
    """Continue each prompt until ``end_id``.

    Sampling draws from torch's process-wide generator, as transformers does: seeded for this call, then put back.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        prompts: token ids.
        settings: how to choose.
        end_id: the token that ends a text.
        batch_size: prompts at a time; those of like length go together, padded on the left.
        longest: tokens of prompt and answer together, the model's limit.

    Returns:
        The continuations without special tokens, in the order of the prompts.
    """
    settings.check()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    padding, device = pad_id(tokenizer), next(model.parameters()).device
    texts = [""] * len(prompts)
    with inference(model), confined_randomness(settings.seed):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = pad_batch(
                [{"input_ids": prompts[i], "attention_mask": [1] * len(prompts[i])} for i in places],
                ("input_ids", "attention_mask"),
                padding,
                left=True,
            )
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            used = inputs["input_ids"].shape[1]
            arguments = settings.for_transformers(max(1, longest - used)) | {
                "eos_token_id": end_id,
                "pad_token_id": padding,
            }
            output = cast(Any, model).generate(**inputs, **arguments)[:, used:]
            for place, row in zip(places, cast(list[list[int]], output.tolist()), strict=True):
                answer = row[: row.index(end_id)] if end_id in row else row
                texts[place] = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return texts
