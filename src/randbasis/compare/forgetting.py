"""What a language model has forgotten: its perplexity on a text of the kind that its base was trained on."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randbasis.errors import EmptyDataError
from randbasis.files.text_files import read_text
from randbasis.train.tabular import STORY_END

WINDOWS = 32
"""Stretches of text that are read."""
WINDOW = 128
"""Tokens of one."""
BATCH = 8


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: Any, path: str | Path) -> float:
    """``exp`` of the mean loss of a token over the first stretches of a text, each read from its start.

    Args:
        model: a causal language model.
        tokenizer: its own.
        path: a file of plain text, gzip or not.

    Raises:
        EmptyDataError: the text has less than one stretch.
    """
    device = next(model.parameters()).device
    text = read_text(Path(path))[: 40 * WINDOWS * WINDOW].replace(STORY_END, "")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: WINDOWS * WINDOW], device=device)
    if len(ids) < WINDOW:
        raise EmptyDataError(f"{path} has {len(ids)} tokens, and forgetting is measured on at least {WINDOW}")
    rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    was_training = model.training
    model.eval()
    parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in parts]
    model.train(was_training)
    return math.exp(sum(losses) / len(rows))
