"""Language models: what is learned, exact losses, several references, generation."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from randbasis.errors import EmptyDataError, SettingError
from randbasis.train import (
    AdapterSettings,
    CausalLanguage,
    DataSettings,
    GenerationSettings,
    LoopSettings,
    TrainSettings,
    prepare,
    train,
)
from randbasis.train.metrics import bleu, chrf
from randbasis.use import UseSettings, evaluate, generate, predict


def settings_of(model: str, data: DataSettings, **rest: object) -> TrainSettings:
    return TrainSettings("causal-lm", model, data, "never-made", **rest)


@pytest.fixture
def pairs(language_model: str, pairs_jsonl: str) -> TrainSettings:
    return settings_of(
        language_model, DataSettings(pairs_jsonl, prompt_column="mr", target_column="ref"), separator="="
    )


@pytest.fixture(scope="module")
def trained(language_model: str, pairs_jsonl: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = DataSettings(pairs_jsonl, eval=pairs_jsonl, prompt_column="mr", target_column="ref")
    loop = LoopSettings(max_steps=150, batch_size=10, learning_rate=5e-2, eval_every=50, threads=1)
    output = tmp_path_factory.mktemp("trained") / "run"
    run = TrainSettings("causal-lm", language_model, data, output, adapter=AdapterSettings("lora", rank=8), loop=loop)
    assert train(run).summary["after"]["loss"] < 0.8
    return output


def test_only_target_and_end_token_are_learned(pairs: TrainSettings):
    prepared = prepare(pairs)
    task = prepared.task
    assert isinstance(task, CausalLanguage)
    example = next(e for e in prepared.train if len(e["target"]) == 4)
    letter = example["prompt"]
    ids = task.tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert ids == ["<s>", letter, "=", letter, letter, " ", letter, "</s>"]
    assert example["labels"] == [-100, -100, -100, *example["input_ids"][3:]]
    assert task.answer_length == 5
    assert task.prompt_ids(letter) == example["input_ids"][:3]


def test_references_are_examples_and_prompts_stay_together(pairs: TrainSettings):
    prepared = prepare(replace(pairs, data=replace(pairs.data, eval_fraction=0.3)))
    assert len(prepared.train) == 14
    assert len(prepared.eval) == 6
    assert {e["prompt"] for e in prepared.train}.isdisjoint({e["prompt"] for e in prepared.eval})


def test_another_end_token(pairs: TrainSettings):
    assert prepare(replace(pairs, end_token="z")).train[0]["labels"][-1] == 29
    with pytest.raises(SettingError, match="end_token '<end>' is not in the tokenizer's vocabulary"):
        prepare(replace(pairs, end_token="<end>"))


def test_long_rows_are_cut(pairs: TrainSettings):
    with pytest.warns(UserWarning, match="longer than 6 tokens"):
        prepared = prepare(replace(pairs, max_length=6))
    assert {len(e["input_ids"]) for e in prepared.train} == {6}
    task = prepared.task
    assert isinstance(task, CausalLanguage)
    assert task.prompt_ids("abcdefgh") == task.tokenizer("fgh=")["input_ids"][1:]


def test_plain_text_is_learned_in_blocks(language_model: str, tmp_path: Path):
    path = tmp_path / "texts.txt"
    path.write_text("abcdefghij\nxyz\n")
    prepared = prepare(settings_of(language_model, DataSettings(path, text_column="text", eval=path), max_length=5))
    tokens = [prepared.task.tokenizer.convert_ids_to_tokens(e["input_ids"]) for e in prepared.train]
    assert ["".join(block) for block in tokens] == ["<s>abcd", "efghi", "j</s>", "<s>xyz</s>"]
    assert all(e["labels"] == e["input_ids"] for e in prepared.train)


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_loss_against_a_loop_over_tokens(pairs: TrainSettings, batch_size: int):
    prepared = prepare(replace(pairs, data=replace(pairs.data, eval=pairs.data.train)))
    model = prepared.load_model(pairs).eval()
    logs: list[float] = []
    for example in prepared.eval:
        with torch.no_grad():
            table = log_softmax(model(input_ids=torch.tensor([example["input_ids"]])).logits[0].double(), -1)
        logs += [float(table[i - 1, label]) for i, label in enumerate(example["labels"]) if label != -100]
    scores = prepared.task.score(model, prepared.eval, batch_size)
    assert scores["loss"] == pytest.approx(-sum(logs) / len(logs), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))


def test_scoring_restores_the_mode_of_every_module(pairs: TrainSettings):
    prepared = prepare(pairs)
    model = prepared.load_model(pairs).train()
    model.get_submodule("model.layers.0").eval()
    modes = [module.training for module in model.modules()]
    prepared.task.score(model, prepared.eval, 4)
    assert [module.training for module in model.modules()] == modes


def test_texts_are_scored_against_all_references_of_a_prompt(trained: Path, tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("mr,ref\na,aa a\nb,zz z q\na,a a\n")
    use = UseSettings(adapter=trained, data=path)
    texts = {row["prompt"]: row["text"] for row in generate(use, ["a", "b"])}
    metrics = evaluate(use)["metrics"]
    references = [["aa a", "a a"], ["zz z q"]]
    assert metrics["chrf"] == pytest.approx(chrf([texts["a"], texts["b"]], references))
    assert metrics["bleu"] == pytest.approx(bleu([texts["a"], texts["b"]], references))
    assert "bleu" not in evaluate(use, texts=False)["metrics"]
    assert [row["prediction"] for row in predict(use)] == [texts["a"], texts["b"], texts["a"]]


def test_generation_does_not_depend_on_the_batch(trained: Path):
    prompts = ["a", "abc", "jihgfedc", "e"]
    one = generate(UseSettings(adapter=trained, batch_size=1), prompts)
    together = generate(UseSettings(adapter=trained, batch_size=4), prompts)
    assert one == together
    assert [row["prompt"] for row in one] == prompts
    assert any(row["text"] for row in one)


def test_beams_and_sampling(trained: Path):
    before = torch.get_rng_state()

    def texts(**settings: object) -> list[str]:
        chosen = GenerationSettings(max_new_tokens=12, **settings)
        rows = generate(UseSettings(adapter=trained, generation=chosen), list("abcdef"))
        return [row["text"] for row in rows]

    sampled = texts(sample=True, temperature=3.0, seed=1)
    assert sampled == texts(sample=True, temperature=3.0, seed=1)
    assert sampled != texts(sample=True, temperature=3.0, seed=2)
    assert texts(sample=True, top_k=1) == texts()
    assert len(texts(beams=3, length_penalty=0.5)) == 6
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"beams": 0}, "beams"), ({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": 0.0}, "temperature"),
     ({"top_p": 1.5}, "top_p"), ({"seed": -1}, "seed")],
)  # fmt: skip
def test_bad_generation_settings(trained: Path, change: dict[str, float], message: str):
    with pytest.raises(SettingError, match=message):
        generate(UseSettings(adapter=trained, generation=GenerationSettings(**change)), ["a"])


def test_a_base_alone_and_a_foreign_adapter(language_model: str, trained: Path, tmp_path: Path, pairs_jsonl: str):
    columns = {"prompt": "mr", "target": "ref"}
    base = evaluate(UseSettings(model=language_model, data=pairs_jsonl, columns=columns), texts=False)["metrics"][
        "loss"
    ]
    (tmp_path / "foreign").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "foreign" / name).write_bytes((trained / name).read_bytes())
    foreign = UseSettings(adapter=tmp_path / "foreign", data=pairs_jsonl, columns=columns)
    assert evaluate(foreign, texts=False)["metrics"]["loss"] < base - 1
    assert len(generate(UseSettings(model=language_model), ["ab"])) == 1


def test_what_cannot_be_prepared(pairs: TrainSettings, language_model: str, trained: Path, tmp_path: Path):
    with pytest.raises(
        SettingError, match=r"needs prompt_column and target_column .*, or text_column alone, or messages_column"
    ):
        prepare(replace(pairs, data=replace(pairs.data, target_column=None)))
    with pytest.raises(SettingError, match="give a prompt"):
        generate(UseSettings(adapter=trained))
    with pytest.raises(SettingError, match="causal-lm has no label_column"):
        generate(UseSettings(adapter=trained, columns={"label": "x"}), ["a"])
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"mr": "a"}) + "\n")
    with pytest.raises(EmptyDataError, match="no column of answers"):
        evaluate(UseSettings(adapter=trained, data=path))
    with pytest.raises(SettingError, match="neither an adapter nor a model"):
        generate(UseSettings(), ["a"])


def test_prompts_that_are_cut_are_counted(trained: Path):
    use = UseSettings(adapter=trained, threads=1, generation=GenerationSettings(max_new_tokens=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(use, ["a", "abcdefghij" * 10])
    (told,) = (str(one.message) for one in caught if "(max_length)" in str(one.message))
    assert told.startswith("1 of 2 prompts are longer than 48 tokens (max_length), of which a prompt may take 36, and")
