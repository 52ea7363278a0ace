"""Prompts of several columns: filled, refused, trained with and asked again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from randbasis.errors import ColumnError, SettingError
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, prepare, train
from randbasis.train.templates import Template
from randbasis.use import UseSettings, evaluate, generate, predict

ROWS = [{"one": letter, "two": other, "ref": letter + other} for letter in "abcd" for other in "xyz"]


@pytest.fixture
def template_run(language_model: str, tmp_path: Path) -> TrainSettings:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    data = DataSettings(path, eval=path, target_column="ref")
    loop = LoopSettings(max_steps=150, batch_size=12, learning_rate=5e-2, eval_every=75, threads=1)
    return TrainSettings(
        "causal-lm", language_model, data, tmp_path / "run", prompt_template="{two} {one}=", loop=loop,
        adapter=AdapterSettings("lora", rank=8),
    )  # fmt: skip


def test_a_template_is_filled():
    template = Template(r"T: {title}\n{{x}}\t{my body} =>", "prompt_template")
    assert template.fields == ("title", "my body")
    assert template.fill({"title": "a{b}", "my body": r"c\n"}) == "T: a{b}\n{x}\tc\\n =>"


@pytest.mark.parametrize(
    ("text", "message"),
    [("a {b", "cannot be read"), ("a {b!r}", "nothing but the names"), ("{b:>3}", "nothing but the names"),
     ("{}", "nothing but the names"), ("a", "it names none")],
)  # fmt: skip
def test_what_is_no_template(text: str, message: str):
    with pytest.raises(SettingError, match=message):
        Template(text, "prompt_template")


def test_what_is_learned_of_a_row_with_a_template(template_run: TrainSettings):
    prepared = prepare(template_run)
    words = prepared.task.tokenizer.convert_ids_to_tokens(prepared.train[0]["input_ids"])
    assert "".join(words) == "<s>x a=ax</s>"
    assert prepared.train[0]["labels"] == [-100] * 5 + prepared.train[0]["input_ids"][5:]
    data = replace(template_run.data, target_column=None)
    both = prepare(replace(template_run, data=data, target_template="{one}{one}"))
    assert [e["target"] for e in both.train[:4]] == ["aa", "aa", "aa", "bb"]


def test_what_a_template_may_not_be_beside(template_run: TrainSettings):
    with pytest.raises(ColumnError, match="has the column 'ref', which is to be written"):
        prepare(replace(template_run, prompt_template="{ref} {one}="))
    with pytest.raises(SettingError, match="two ways to say the same"):
        prepare(replace(template_run, data=replace(template_run.data, prompt_column="one")))
    with pytest.raises(ColumnError, match="column 'three' is not in"):
        prepare(replace(template_run, prompt_template="{three}="))


def test_an_adapter_asks_with_its_template(template_run: TrainSettings, tmp_path: Path):
    outcome = train(template_run)
    use = UseSettings(adapter=outcome.output, threads=1)
    (answer,) = generate(use, ['{"one": "b", "two": "y"}'])
    assert answer["text"] == "b y"  # as a tokenizer of words writes it
    with pytest.raises(SettingError, match=r'give it as {"two": "...", "one": "..."}'):
        generate(use, ["b"])
    path = tmp_path / "asked.csv"
    path.write_text("two,one\nz,c\n")
    assert predict(replace(use, data=path))[0]["prediction"] == "c z"
    assert generate(replace(use, data=path)) == [{"prompt": "z c=", "text": "c z"}]
    scores = evaluate(replace(use, data=template_run.data.train))["metrics"]
    assert scores["loss"] == pytest.approx(outcome.summary["after"]["loss"], rel=1e-5)
