"""Texts from prompts: greedy, beam search or sampling."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from randbasis.progress import Track
from randbasis.train.classification import pad_batch, pad_id
from randbasis.train.randomness import confined_randomness
from randbasis.train.settings import GenerationSettings
from randbasis.train.task import inference


def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    *,
    end_id: int,
    batch_size: int,
    longest: int,
    track: Track = iter,
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
        track: shows the progress over the batches.

    Returns:
        The continuations without special tokens, in the order of the prompts.
    """
    settings.check()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    padding, device = pad_id(tokenizer), next(model.parameters()).device
    texts = [""] * len(prompts)
    with inference(model), confined_randomness(settings.seed):
        for start in track(range(0, len(order), batch_size)):
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
