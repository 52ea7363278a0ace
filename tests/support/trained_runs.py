"""An adapter trained for each task, in every place where an adapter may be."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import sentences

from randbasis.adapter_file import read
from randbasis.adapters import pack_adapter
from randbasis.store import AdapterStore
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, train
from randbasis.use import write_lines

NOLA = AdapterSettings(method="nola", rank=2, basis=8, seed=5)
LOOP = LoopSettings(max_steps=6, batch_size=8, learning_rate=5e-2, eval_every=6, threads=1)
TASKS = ("text", "pooled", "pair", "number", "image", "prompt", "template", "chat", "plain")
PLACES = ("file", "url", "store", "version")


#: Task of a language model → its columns and what stands around them.
LANGUAGE: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "prompt": ({"prompt_column": "mr", "target_column": "ref"}, {"separator": "="}),
    "template": ({"target_column": "ref"}, {"prompt_template": "{mr} = {mr} >"}),
    "chat": ({"messages_column": "talk"}, {}),
    "plain": ({"text_column": "text"}, {}),
}
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}u {{ m.content }}{% else %} a {{ m.content }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} a {% endif %}"
)


@dataclass(frozen=True)
class Trained:
    """One task: its base, its held-out rows and, place → where, its adapter at 32 bits."""

    base: str
    data: str
    where: dict[str, str]

    @property
    def folder(self) -> str:
        return self.where["folder"]


def of_task(task: str, bases: dict[str, str], rows: Path, files: dict[str, Any]) -> TrainSettings:
    """A short run."""
    output = rows / task
    if task == "image":
        return TrainSettings("image-classification", bases["vision"], DataSettings(files["images"]), output, NOLA, LOOP)
    if task in LANGUAGE:
        columns, options = LANGUAGE[task]
        data = DataSettings(files[task], eval=files[task], **columns)
        if task == "chat":
            options = {"chat_template": rows / "template.jinja"}
        return TrainSettings("causal-lm", bases["language"], data, output, NOLA, LOOP, **options)
    columns = {"text_column": "sentence", "label_column": "label"}
    pooling = "mean" if task == "pooled" else "auto"
    columns |= {"text_pair_column": "other"} if task == "pair" else {}
    data = DataSettings(files[task], eval=files[task], **columns)
    return TrainSettings(
        "sequence-classification", bases["encoder"], data, output, NOLA, LOOP, max_length=9, pooling=pooling
    )


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    encoder: str,
    language_model: str,
    vision_model: str,
    held_csv: str,
    pairs_jsonl: str,
    image_folder: Path,
) -> Iterator[dict[str, Trained]]:
    """Task → its adapter; ``RANDBASIS_STORE`` names the store of them all. Some rows are cut at the longest length."""
    rows = tmp_path_factory.mktemp("trained")
    bases = {"encoder": encoder, "language": language_model, "vision": vision_model}
    files: dict[str, Any] = {
        "text": held_csv,
        "pooled": held_csv,
        "prompt": pairs_jsonl,
        "template": pairs_jsonl,
        "images": image_folder,
    }
    for name in ("pair", "number", "plain", "chat"):
        files[name] = rows / f"{name}.jsonl"
    told = sentences(24, 2)
    write_lines([{**row, "other": told[i - 1]["sentence"]} for i, row in enumerate(told)], files["pair"])
    write_lines([{**row, "label": 0.5 + (row["label"] == "pos")} for row in told], files["number"])
    write_lines([{"text": f"{letter} {letter}"} for letter in "abcdefghij"], files["plain"])
    asked = [[("user", one), ("assistant", one * 2)] for one in "abcdefgh"]
    talks = [[{"role": role, "content": text} for role, text in turns] for turns in asked]
    write_lines([{"talk": one} for one in talks], files["chat"])
    (rows / "template.jinja").write_text(CHAT)
    url = f"memory://{os.urandom(8).hex()}"
    found: dict[str, Trained] = {}
    with pytest.MonkeyPatch.context() as patch, AdapterStore(rows / "some.db") as store:
        patch.setenv("RANDBASIS_STORE", str(rows / "some.db"))
        for task in TASKS:
            settings = of_task(task, bases, rows, files)
            packed = rows / f"{task}.safetensors"
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*(are longer than|a path of this machine)")
                train(settings)
                pack_adapter(rows / task, packed, bits=32)
            read(packed).write(f"{url}/{task}.safetensors")
            store.add(f"of/{task}", packed)
            where = {"folder": str(rows / task), "file": str(packed), "url": f"{url}/{task}.safetensors"}
            where |= {"store": f"store:of/{task}", "version": f"store:of/{task}@1"}
            data = str(settings.data.train if task != "image" else image_folder)
            found[task] = Trained(settings.model, data, where)
        yield found
