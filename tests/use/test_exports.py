"""What an adapter was trained for goes with its export: labels, columns, prompts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trained_runs import TASKS, Trained
from transformers import AutoConfig

from randbasis.adapters import open_adapter
from randbasis.adapters.merging import merge_adapter
from randbasis.export import export_peft_lora
from randbasis.use import UseSettings, evaluate, generate, predict

pytestmark = pytest.mark.filterwarnings("ignore:.*are longer than")
#: Folder of an export and its base, sentences → what plain transformers answers, with the classes by their names.
PLAIN = """
import json, sys
sys.modules["randbasis"] = None
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, base, *texts = sys.argv[1:]
words = AutoTokenizer.from_pretrained(base, model_max_length=9)
config = AutoConfig.from_pretrained(folder + "/base-config")
model = AutoModelForSequenceClassification.from_pretrained(folder, config=config)
pipe = pipeline("text-classification", model=model, tokenizer=words)
print(json.dumps(pipe(texts, truncation=True)))
"""


def numbers(answers: list[dict[str, Any]]) -> list[Any]:
    """Answers with numbers that two orders of summation may differ in."""
    return [
        {
            key: pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float) else value
            for key, value in one.items()
        }
        for one in answers
    ]


@pytest.mark.parametrize("task", TASKS)
def test_the_lora_answers_as_the_adapter(task: str, trained: dict[str, Trained], tmp_path: Path):
    one = trained[task]
    export_peft_lora(one.folder, tmp_path / "lora")
    found = open_adapter(tmp_path / "lora")
    assert (found.kind, found.method, found.base_model) == ("LORA", "lora", one.base)
    assert found.task == open_adapter(one.folder).task
    settings = [UseSettings(folder, data=one.data, threads=1) for folder in (tmp_path / "lora", one.folder)]
    got, want = (evaluate(each)["metrics"] for each in settings)
    # A correlation of answers that are nearly equal moves more than they do; they are compared one by one below.
    assert got == pytest.approx(want, rel=1e-5, abs=1e-3)
    if task == "plain":
        assert generate(settings[0], ["ab"]) == generate(settings[1], ["ab"])
    else:
        got, want = (predict(each) for each in settings)
        assert got == numbers(want)


def test_plain_transformers_names_the_classes(trained: dict[str, Trained], tmp_path: Path):
    one = trained["text"]
    export_peft_lora(one.folder, tmp_path / "lora")
    rows = predict(UseSettings(one.folder, data=one.data, threads=1))
    texts = [row["sentence"] for row in rows]
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "lora"), one.base, *texts]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    got = [{"prediction": said["label"], "probability": said["score"]} for said in json.loads(run.stdout)]
    assert got == numbers([{key: row[key] for key in ("prediction", "probability")} for row in rows])


def test_a_number_is_said_to_be_one(trained: dict[str, Trained], tmp_path: Path):
    one = trained["number"]
    export_peft_lora(one.folder, tmp_path / "lora")
    merge_adapter(one.base, one.folder, tmp_path / "merged")
    for folder in ("lora/base-config", "merged"):
        config = AutoConfig.from_pretrained(tmp_path / folder)
        assert (config.num_labels, config.problem_type) == (1, "regression"), folder


def test_an_older_export_leaves_nothing_behind(trained: dict[str, Trained], tmp_path: Path):
    export_peft_lora(trained["text"].folder, tmp_path / "lora")
    done = export_peft_lora(trained["pooled"].folder, tmp_path / "lora", overwrite=True)
    there = {path.name: path.stat().st_size for path in (tmp_path / "lora").iterdir()}
    assert there.keys() == {"adapter_config.json", "adapter_model.safetensors", "head.safetensors", "task.json"}
    assert done.bytes == sum(there.values())
