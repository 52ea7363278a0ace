"""A language model that continues a prompt, or that is trained on plain text."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from randbasis.adapters.base_model import read_config
from randbasis.errors import EmptyDataError, SettingError, near
from randbasis.train.classification import allowed_length, pad_batch, pad_id
from randbasis.train.generation import generate_texts
from randbasis.train.metrics import bleu, chrf
from randbasis.train.model_reading import read_model, read_tokenizer
from randbasis.train.randomness import confined_randomness
from randbasis.train.settings import GenerationSettings, TrainSettings
from randbasis.train.tabular import Table
from randbasis.train.task import CUT, Batch, Example, Task, inference

DEFAULT_MAX_LENGTH = 512


class CausalLanguage(Task):
    """Causal language modelling.

    A row of prompt and target becomes ``prompt + separator + target + end token``; only target and end token are
    learned. A row of plain text is learned whole, in blocks of ``max_length``.

    Args:
        tokenizer: of the base.
        columns: ``prompt`` and ``target``, or ``text``: where they are in a table.
        max_length: tokens a row.
        separator: between prompt and target.
        end_id: token that ends a text.
        answer_length: tokens of the longest target seen in training, end token included.
    """

    name = "causal-lm"
    peft_task_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"

    def __init__(
        self,
        tokenizer: Any,
        columns: dict[str, str | None],
        max_length: int,
        separator: str,
        end_id: int,
        answer_length: int = 0,
    ):
        self.tokenizer = tokenizer
        self.columns = columns
        self.max_length = max_length
        self.separator = separator
        self.end_id = end_id
        self.answer_length = answer_length
        self.prompted = columns["prompt"] is not None
        self.metric_names = ("loss", "perplexity", "bleu", "chrf") if self.prompted else ("loss", "perplexity")
        self.generation = GenerationSettings()
        self.with_generation = False
        self.choose_metric(None)

    @classmethod
    def prepare(cls, settings: TrainSettings, table: Table) -> "CausalLanguage":
        """The task as the settings imply it.

        Raises:
            SettingError: neither a text column nor a prompt and a target column was named, or the end token is unknown.
        """
        data = settings.data
        prompted = data.prompt_column is not None and data.target_column is not None
        plain = data.text_column is not None and not (data.prompt_column or data.target_column)
        if plain == prompted or (prompted and data.text_column is not None):
            raise SettingError(
                f"{cls.name} needs prompt_column and target_column, or text_column alone; "
                f"{table.source} has {', '.join(table.columns)}"
            )
        columns = {
            "prompt": data.prompt_column,
            "target": data.target_column,
            "text": None if prompted else data.text_column,
        }
        tokenizer = read_tokenizer(settings.model)
        limit = allowed_length(tokenizer, read_config(settings.model))
        task = cls(
            tokenizer,
            columns,
            min(limit, settings.max_length or DEFAULT_MAX_LENGTH),
            settings.separator,
            end_token_id(tokenizer, settings.end_token),
        )
        task.choose_metric(settings.loop.metric)
        task.with_generation = task.metric in ("bleu", "chrf")
        return task

    @classmethod
    def from_description(cls, description: dict[str, Any], model: str) -> "CausalLanguage":
        """The task that an adapter directory describes, on the base ``model``."""
        return cls(
            read_tokenizer(model),
            description["columns"],
            description["max_length"],
            description["separator"],
            description["end_id"],
            description["answer_length"],
        )

    def description(self) -> dict[str, Any]:
        """See :meth:`Task.description`."""
        return {
            "task": self.name,
            "columns": self.columns,
            "max_length": self.max_length,
            "separator": self.separator,
            "end_id": self.end_id,
            "answer_length": self.answer_length,
        }

    def load_model(self, name: str, *, dtype: str, seed: int) -> nn.Module:
        """See :meth:`Task.load_model`."""
        with confined_randomness(seed):
            return read_model(AutoModelForCausalLM, name, dtype, complete=True)[0]

    def head_modules(self, model: nn.Module) -> list[str]:
        """None: a language model is adapted as it is."""
        return []

    def encode(self, table: Table, *, training: bool) -> list[Example]:
        """See :meth:`Task.encode`; with several references a row gives an example for each."""
        if not self.prompted:
            if self.columns["text"] is None:
                raise SettingError(
                    f"the columns are not known; name prompt_column and target_column, or text_column: {table.source} "
                    f"has {', '.join(table.columns)}"
                )
            return self._blocks(table.texts(self.columns["text"]))
        prompts = self.prompts(table)
        if not training and self.columns["target"] not in table.columns:
            return self.prompt_examples(prompts)
        examples: list[Example] = []
        for prompt, targets in zip(prompts, table.references(self.columns["target"]), strict=True):
            examples += [self._pair(prompt, target) for target in targets]
        if training:
            self.answer_length = max(sum(label != -100 for label in e["labels"]) for e in examples)
        return examples

    def prompts(self, table: Table) -> list[str]:
        """The prompts of a table as texts."""
        return table.texts(self.columns["prompt"] or "")

    def prompt_examples(self, prompts: Sequence[str]) -> list[Example]:
        """Prompts without answers, with what of each is kept."""
        starts = map(self._start, prompts)
        return [{"prompt": p, "input_ids": ids, CUT: cut} for p, (ids, cut) in zip(prompts, starts, strict=True)]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Tokens of a prompt and the separator, as generation starts from them; cut on the left to leave room."""
        return self._start(prompt)[0]

    def _start(self, prompt: str) -> tuple[list[int], bool]:
        """Tokens of a prompt and the separator, and whether some were cut."""
        text = prompt + self.separator if self.prompted else prompt
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        if ids and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
            ids = ids[:-1]
        room = self._prompt_room
        return ids[-room:], len(ids) > room

    @property
    def _prompt_room(self) -> int:
        """Tokens that a prompt may take, so that there is room for an answer."""
        return max(1, self.max_length * 3 // 4)

    def longest(self) -> str:
        """See :meth:`Task.longest`."""
        return f"{super().longest()}, of which a prompt may take {self._prompt_room},"

    def _pair(self, prompt: str, target: str) -> Example:
        start, cut = self._start(prompt)
        answer = [*self.tokenizer(target, add_special_tokens=False)["input_ids"], self.end_id]
        ids = (start + answer)[: self.max_length]
        labels = ([-100] * len(start) + answer)[: self.max_length]
        return {
            "prompt": prompt,
            "target": target,
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": labels,
            CUT: cut or len(start) + len(answer) > self.max_length,
        }

    def _blocks(self, texts: Sequence[str]) -> list[Example]:
        examples: list[Example] = []
        for text in texts:
            ids: list[int] = self.tokenizer(text)["input_ids"]
            ids = ids if ids and ids[-1] == self.end_id else [*ids, self.end_id]
            for start in range(0, len(ids), self.max_length):
                block = ids[start : start + self.max_length]
                if len(block) > 1:
                    examples.append({"input_ids": block, "attention_mask": [1] * len(block), "labels": block})
        if not examples:
            raise EmptyDataError("the texts have no tokens")
        self.answer_length = min(self.max_length, max(len(e["input_ids"]) for e in examples))
        return examples

    def collate(self, examples: Sequence[Example]) -> Batch:
        """See :meth:`Task.collate`."""
        return pad_batch(examples, ("input_ids", "attention_mask", "labels"), pad_id(self.tokenizer))

    def items(self, batch: Batch) -> int:
        """See :meth:`Task.items`; the first token of a row is not predicted."""
        return int((batch["labels"][:, 1:] != -100).sum())

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """See :meth:`Task.lengths`."""
        return [len(example["input_ids"]) for example in examples]

    def score(self, model: nn.Module, examples: Sequence[Example], batch_size: int) -> dict[str, float]:
        """Loss in nats a learned token, perplexity; BLEU and chrF where texts are to be generated."""
        if not examples or "labels" not in examples[0]:
            raise EmptyDataError("there are no rows with a target to evaluate on")
        total, count = 0.0, 0
        with inference(model):
            for _, batch in self.batches(model, examples, batch_size):
                labels = batch.pop("labels")[:, 1:]
                logits = model(**batch).logits[:, :-1].float()
                total += float(
                    cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
                )
                count += int((labels != -100).sum())
        if count == 0:
            raise EmptyDataError("no row has a token to learn after its prompt; raise max_length")
        loss = total / count
        scores = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        return scores | self._text_scores(model, examples, batch_size) if self.with_generation else scores

    def _text_scores(self, model: nn.Module, examples: Sequence[Example], batch_size: int) -> dict[str, float]:
        """BLEU and chrF; rows of the same prompt are references of one text."""
        references: dict[str, list[str]] = {}
        for example in examples:
            references.setdefault(example["prompt"], []).append(example["target"])
        texts = self.answers(model, list(references), batch_size)
        return {"bleu": bleu(texts, list(references.values())), "chrf": chrf(texts, list(references.values()))}

    def answers(self, model: nn.Module, prompts: Sequence[str], batch_size: int) -> list[str]:
        """One generated text a prompt, as ``generation`` asks for."""
        settings = self.generation
        if settings.max_new_tokens is None:
            settings = replace(settings, max_new_tokens=max(1, self.answer_length or self.max_length // 2))
        return generate_texts(
            model,
            self.tokenizer,
            [self.prompt_ids(p) for p in prompts],
            settings,
            end_id=self.end_id,
            batch_size=batch_size,
            longest=self.max_length,
        )

    def predict(self, model: nn.Module, examples: Sequence[Example], batch_size: int) -> list[dict[str, Any]]:
        """The generated text of each row."""
        if not self.prompted:
            raise SettingError("a model of plain text has no prompts to answer; use generate")
        prompts = [example["prompt"] for example in examples]
        distinct = list(dict.fromkeys(prompts))
        texts = dict(zip(distinct, self.answers(model, distinct, batch_size), strict=True))
        return [{"prediction": texts[prompt]} for prompt in prompts]


def end_token_id(tokenizer: Any, token: str | None) -> int:
    """The id of the token that ends a text; ``None`` is the tokenizer's own.

    Raises:
        SettingError: the tokenizer has no such token.
    """
    if token is None:
        if tokenizer.eos_token_id is None:
            raise SettingError("the tokenizer has no end-of-text token; name one of its tokens with end_token")
        return int(tokenizer.eos_token_id)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if token not in vocabulary:
        raise SettingError(f"end_token {token!r} is not in the tokenizer's vocabulary; {near(token, vocabulary)}")
    return vocabulary[token]
