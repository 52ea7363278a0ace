"""A language model that continues a prompt, or that is trained on plain text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from randbasis.adapters.base_model import read_config
from randbasis.errors import ColumnError, EmptyDataError, SettingError, near
from randbasis.train.chat import Chat, Conversation, asked, conversations
from randbasis.train.classification import allowed_length, pad_batch, pad_id
from randbasis.train.generation import generate_texts
from randbasis.train.machine import Quantized
from randbasis.train.metrics import bleu, chrf
from randbasis.train.model_reading import read_model, read_tokenizer
from randbasis.train.packing import collate_packs
from randbasis.train.randomness import confined_randomness
from randbasis.train.row_format import RowFormat, roles
from randbasis.train.settings import GenerationSettings, TrainSettings
from randbasis.train.tabular import Table
from randbasis.train.task import CUT, Batch, Example, Task, inference

DEFAULT_MAX_LENGTH = 512
ANSWER = "answer_tokens"
"""Key of an example: how many tokens its target has, as far as they are kept."""


class CausalLanguage(Task):
    """Causal language modelling.

    A row of prompt and target becomes ``prompt + separator + target + end token``; only target and end token are
    learned. Of a conversation what the assistant says is learned. A row of plain text is learned whole, in blocks of
    ``max_length``.

    Args:
        tokenizer: of the base.
        columns: ``prompt`` and ``target``, ``text``, or ``messages``: where they are in a table.
        max_length: tokens a row.
        format: what stands around and between them.
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
        format: RowFormat,
        end_id: int,
        answer_length: int = 0,
    ):
        self.tokenizer = tokenizer
        self.columns = columns
        self.max_length = max_length
        self.format = format
        self.chat = Chat(tokenizer, format.chat_template) if "messages" in columns else None
        self.end_id = end_id
        self.answer_length = answer_length
        self.metric_names = ("loss", "perplexity", "bleu", "chrf") if self.prompted else ("loss", "perplexity")
        self.generation = GenerationSettings()
        self.with_generation = False
        self.choose_metric(None)

    @property
    def prompted(self) -> bool:
        """Whether rows have prompts, rather than plain text."""
        return is_prompted(self.columns, self.format)

    @classmethod
    def prepare(cls, settings: TrainSettings, table: Table) -> "CausalLanguage":
        """The task as the settings imply it.

        Raises:
            SettingError: neither a text, a prompt and a target, nor a conversation was named, the tokenizer has no chat
                template, or the end token is unknown.
        """
        columns, format = roles(settings, table), RowFormat.of(settings)
        tokenizer = read_tokenizer(settings.model)
        limit = allowed_length(tokenizer, read_config(settings.model))
        own = Chat(tokenizer, format.chat_template).end_id if "messages" in columns else None
        end_id = end_token_id(tokenizer, settings.end_token) if own is None or settings.end_token else own
        task = cls(tokenizer, columns, min(limit, settings.max_length or DEFAULT_MAX_LENGTH), format, end_id)
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
            RowFormat.from_record(description),
            description["end_id"],
            description["answer_length"],
        )

    def description(self) -> dict[str, Any]:
        """See :meth:`Task.description`."""
        return {
            "task": self.name,
            "columns": self.columns,
            "max_length": self.max_length,
            **self.format.record(),
            "end_id": self.end_id,
            "answer_length": self.answer_length,
        }

    def load_model(self, name: str, *, dtype: str, seed: int, quantized: Quantized | None = None) -> nn.Module:
        """See :meth:`Task.load_model`."""
        with confined_randomness(seed):
            return read_model(AutoModelForCausalLM, name, dtype, complete=True, quantized=quantized)[0]

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
        if not training and not self._has_answers(table):
            return self.prompt_examples(self.prompts(table))
        examples = self._conversations(table) if self.chat else self._pairs(table)
        if training:
            self.answer_length = max(example[ANSWER] for example in examples)
        return examples

    def groups(self, table: Table) -> Sequence[object]:
        """See :meth:`Task.groups`: rows of the same prompt."""
        if not self.prompted:
            return super().groups(table)
        column = self.columns.get("prompt")
        return [str(cell) for cell in table.column(column)] if column else self.prompts(table)

    def prompts(self, table: Table) -> list[str]:
        """The prompts of a table as texts, by their template where there is one."""
        if self.chat is not None:
            return [self.chat.prompt(asked(one)) for one in self._messages(table)]
        template = self.format.prompt
        return template.texts(table) if template else table.texts(self.columns["prompt"] or "")

    def prompt_of(self, text: str) -> str:
        """What a person asks, as :meth:`prompts` has it: the first message of a conversation, the value of a template.

        Raises:
            SettingError: the template has several columns, and the text is no object with a value for each.
        """
        if self.chat is not None:
            return self.prompt_of_messages([{"role": "user", "content": text}])
        return text if self.format.prompt is None else self.format.prompt.of_one(text)

    def prompt_of_messages(self, messages: Conversation) -> str:
        """A conversation up to where the next answer begins.

        Raises:
            SettingError: the model was not trained on conversations.
        """
        if self.chat is None:
            raise SettingError(f"messages are for a model that was trained on conversations; {self.name} here has none")
        return self.chat.prompt(asked(messages))

    def _has_answers(self, table: Table) -> bool:
        if self.chat is not None:
            return any(one is not asked(one) for one in self._messages(table))
        template = self.format.target
        return {*(template.fields if template else (self.columns["target"],))} <= {*table.columns}

    def _messages(self, table: Table) -> list[Conversation]:
        return conversations(table, self.columns["messages"] or "")

    def _pairs(self, table: Table) -> list[Example]:
        template = self.format.target
        texts = template.texts(table) if template else ()
        references = [[one] for one in texts] if template else table.references(self.columns["target"])
        pairs = zip(self.prompts(table), references, strict=True)
        return [self._pair(prompt, target) for prompt, targets in pairs for target in targets]

    def prompt_examples(self, prompts: Sequence[str]) -> list[Example]:
        """Prompts without answers, with what of each is kept."""
        starts = map(self._start, prompts)
        return [{"prompt": p, "input_ids": ids, CUT: cut} for p, (ids, cut) in zip(prompts, starts, strict=True)]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Tokens of a prompt and the separator, as generation starts from them; cut on the left to leave room."""
        return self._start(prompt)[0]

    def _start(self, prompt: str) -> tuple[list[int], bool]:
        """Tokens of a prompt and the separator, and whether some were cut."""
        if self.chat is not None:
            ids = self.chat.ids(prompt)
        else:
            text = prompt + self.format.separator if self.prompted else prompt
            ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        if self.chat is None and ids and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
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
        answer = [*self.tokenizer(target, add_special_tokens=False, verbose=False)["input_ids"], self.end_id]
        example = self._example(start + answer, [False] * len(start) + [True] * len(answer), cut)
        kept = max(0, self.max_length - len(start))
        return {"prompt": prompt, "target": target, ANSWER: min(len(answer), kept), **example}

    def _conversations(self, table: Table) -> list[Example]:
        """An example of each conversation, whose last message is the answer that texts are compared with."""
        assert self.chat is not None
        examples: list[Example] = []
        for number, messages in enumerate(self._messages(table), 1):
            if messages is asked(messages):
                raise ColumnError(
                    f"row {number} of {table.source} ends with a message of {messages[-1]['role']!r}, so that there is "
                    "no answer to learn; take it out, or the messages behind the last answer"
                )
            ids, learned = self.chat.learned(messages)
            end = [self.end_id] if self.chat.end_id is None else []
            target: str = messages[-1]["content"]
            example = self._example([*ids, *end], [*learned, *(True for _ in end)], False)
            answer = min(self.max_length, len(self.chat.ids(target)) + 1)
            examples.append({"prompt": self.chat.prompt(messages[:-1]), "target": target, ANSWER: answer, **example})
        return examples

    def _example(self, ids: list[int], learned: list[bool], cut: bool) -> Example:
        """The first ``max_length`` tokens, and those of them that are learned."""
        whole, kept = self.format.loss_on == "all", ids[: self.max_length]
        labels = [token if whole or one else -100 for token, one in zip(ids, learned, strict=True)]
        return {
            "input_ids": kept,
            "attention_mask": [1] * len(kept),
            "labels": labels[: self.max_length],
            CUT: cut or len(ids) > self.max_length,
        }

    def _blocks(self, texts: Sequence[str]) -> list[Example]:
        examples: list[Example] = []
        for text in texts:
            ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
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

    def training_collate(self, examples: Sequence[Example]) -> Batch:
        """See :meth:`Task.training_collate`; examples may be packs."""
        if "position_ids" in examples[0]:
            return collate_packs(examples, pad_id(self.tokenizer))
        return self.collate(examples)

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
            track=self.track,
        )

    def predict(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int, *, probabilities: bool = False
    ) -> list[dict[str, Any]]:
        """The generated text of each row."""
        if probabilities:
            raise self.no_classes()
        if not self.prompted:
            raise SettingError("a model of plain text has no prompts to answer; use generate")
        prompts = [example["prompt"] for example in examples]
        distinct = list(dict.fromkeys(prompts))
        texts = dict(zip(distinct, self.answers(model, distinct, batch_size), strict=True))
        return [{"prediction": texts[prompt]} for prompt in prompts]


def is_prompted(columns: Mapping[str, str | None], format: RowFormat) -> bool:
    """Whether rows have prompts: in a column, by a template, or in a conversation."""
    return "messages" in columns or columns.get("prompt") is not None or format.prompt_template is not None


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
