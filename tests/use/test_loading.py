"""`randbasis.load`: one object that answers as the commands do, from every place, row by row and thread by thread."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from trained_runs import PLACES, Trained
from transformers import AutoModelForCausalLM, AutoTokenizer

import randbasis
from randbasis import errors
from randbasis.adapter_file import read
from randbasis.store import AdapterStore
from randbasis.train.images import read_images
from randbasis.train.tabular import read_table
from randbasis.use import UseSettings, evaluate, generate, predict

pytestmark = pytest.mark.filterwarnings("ignore:.*are longer than")
CLASSES = ("text", "pooled", "pair", "number")


def loaded(one: Trained, place: str = "file") -> Any:
    return randbasis.load(one.where[place], one.base, device="cpu")


def answers(one: Trained, **settings: Any) -> list[dict[str, Any]]:
    """What the command writes, without the rows."""
    rows = predict(UseSettings(one.folder, data=one.data, device="cpu", **settings))
    return [{key: row[key] for key in row if key.startswith(("prediction", "probab"))} for row in rows]


@pytest.mark.parametrize("task", [*CLASSES, "prompt", "template", "chat"])
class TestRows:
    def test_mappings_are_answered_as_by_the_command(self, task: str, trained: dict[str, Trained]):
        rows = read_table(trained[task].data).rows
        assert loaded(trained[task]).predict(rows) == answers(trained[task])

    def test_texts_and_pairs_are_answered_as_mappings(self, task: str, trained: dict[str, Trained]):
        ready = loaded(trained[task])
        roles = ("text", "text_pair", "prompt", "messages")
        names = [ready.task.columns[role] for role in roles if ready.task.columns.get(role)] or ["mr"]
        rows = read_table(trained[task].data).rows
        texts = [row[names[0]] if len(names) == 1 else tuple(row[name] for name in names) for row in rows]
        assert ready.predict(texts) == ready.predict(rows)
        assert ready.predict([]) == []

    def test_evaluate_as_the_command_does(self, task: str, trained: dict[str, Trained]):
        expected = evaluate(UseSettings(trained[task].folder, data=trained[task].data, device="cpu"))
        assert loaded(trained[task]).evaluate(trained[task].data) == expected
        assert loaded(trained[task]).evaluate(read_table(trained[task].data).rows) == expected


def test_images_by_path_and_at_hand(trained: dict[str, Trained]):
    one = trained["image"]
    files = [str(reference) for reference in read_images(one.data)["test"].column("image")]
    expected = answers(one)
    ready = loaded(one)
    assert ready.predict(files) == ready.predict([{"image": Path(file)} for file in files]) == expected
    assert ready.predict([Image.open(file) for file in files]) == expected
    assert ready.evaluate(one.data) == evaluate(UseSettings(one.folder, data=one.data, device="cpu"))
    assert ready.tokenizer is None
    assert ready.image_processor.size["height"] == 32
    with pytest.raises(errors.DataMissingError, match=r"no\.png"):
        ready.predict(["no.png"])
    with pytest.raises(errors.DataFormatError, match=r"image of PIL, got a int"):
        ready.predict([5])


@pytest.mark.parametrize("task", ["prompt", "template", "chat", "plain"])
def test_generate_as_the_command_does(task: str, trained: dict[str, Trained]):
    one, prompts = trained[task], ["a", "bcd", ""]
    expected = [row["text"] for row in generate(UseSettings(one.folder, device="cpu"), prompts)]
    ready = loaded(one)
    assert ready.generate(prompts) == expected
    if task == "chat":
        assert ready.generate([[{"role": "user", "content": one}] for one in prompts]) == expected
        assert ready.predict(prompts) == [{"prediction": one} for one in expected]
    short = ready.generate(prompts, max_new_tokens=1)
    assert all(len(text) <= 1 for text in short)
    assert ready.generate(prompts) == expected  # what one call asks for is not left behind
    drawn = ready.generate(prompts, sample=True, temperature=5.0, seed=1)
    assert drawn == ready.generate(prompts, sample=True, temperature=5.0, seed=1)
    assert drawn != ready.generate(prompts, sample=True, temperature=5.0, seed=2)


def test_every_place_and_form(trained: dict[str, Trained]):
    one = trained["text"]
    expected = loaded(one, "folder").predict(["a good film"])
    data = Path(one.where["file"]).read_bytes()
    with AdapterStore(Path(one.where["file"]).parent / "some.db") as store:
        stored = store.get("of/text")
    for where in (*(one.where[place] for place in PLACES), data, read(one.where["file"]), stored):
        assert randbasis.load(where, one.base).predict(["a good film"]) == expected
    assert repr(randbasis.load(stored, one.base)) == "<LoadedAdapter 'store:of/text@1': sequence-classification>"


def test_what_it_holds(trained: dict[str, Trained]):
    ready = loaded(trained["text"], "store")
    assert isinstance(ready.model, PeftModel)
    assert not ready.model.training
    assert ready.task.labels == ("neg", "pos")
    assert ready.tokenizer("a film")["input_ids"]
    assert ready.image_processor is None
    half = randbasis.load(trained["text"].folder, dtype=torch.bfloat16, device="cpu")  # the folder names its base
    assert {p.dtype for p in half.model.parameters()} >= {torch.bfloat16}
    renamed = randbasis.load(trained["text"].folder, columns={"text": "words"})
    assert renamed.predict([{"words": "good"}]) == loaded(trained["text"]).predict(["good"])


def test_probabilities_of_every_class(trained: dict[str, Trained]):
    for task in ("text", "image"):
        found = loaded(trained[task]).evaluate(trained[task].data)["rows"]
        rows = predict(UseSettings(trained[task].folder, data=trained[task].data, device="cpu", probabilities=True))
        assert len(rows) == found
        for row in rows:
            each = row["probabilities"]
            assert sorted(each) == sorted(loaded_labels(trained[task]))
            assert sum(each.values()) == pytest.approx(1)
            assert max(each, key=each.__getitem__) == row["prediction"]
            assert each[row["prediction"]] == row["probability"]


def loaded_labels(one: Trained) -> list[str]:
    return json.loads((Path(one.folder) / "task.json").read_text())["task"]["labels"]


def test_threads_get_the_answers_of_one(trained: dict[str, Trained]):
    """Some texts are cut and some are not: a tokenizer that two threads use at once would cut the others too."""
    texts = [" ".join(["good", "film", "bad", "day"] * (1 + i % 5)) for i in range(24)]
    ready = loaded(trained["text"])
    expected = [ready.predict([text, text[:8]]) for text in texts]
    own, inside = ready.tokenizer, list[int]()

    class OneAtATime:
        """The tokenizer, which says that a thread came while another was there."""

        def __call__(self, *words: Any, **options: Any) -> Any:
            inside.append(1)
            time.sleep(0.001)
            found = own(*words, **options)
            assert inside == [1]
            inside.clear()
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(own, name)

    ready.task.tokenizer = OneAtATime()
    with ThreadPoolExecutor(8) as threads:
        assert [*threads.map(lambda text: ready.predict([text, text[:8]]), texts)] == expected


def test_threads_that_draw_and_load(trained: dict[str, Trained]):
    one = trained["prompt"]
    ready = [loaded(one), loaded(one, "folder")]
    options: dict[str, Any] = {"sample": True, "temperature": 5.0}
    before = torch.random.get_rng_state()
    expected = [ready[0].generate(["ab"], seed=seed, **options) for seed in range(12)]
    with ThreadPoolExecutor(4) as threads:
        drawn = [*threads.map(lambda seed: ready[seed % 2].generate(["ab"], seed=seed, **options), range(12))]
        again = [*threads.map(lambda place: loaded(trained["text"], place).predict(["good"]), ["file", "folder"] * 2)]
    assert drawn == expected
    assert all(one == again[0] for one in again)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("task", "rows", "error", "words"),
    [
        ("text", "a good film", errors.DataFormatError, ["must be a list", "one str", "brackets"]),
        ("text", [{"words": "good"}], errors.ColumnError, ["'sentence'", "the rows given", "'words'"]),
        ("text", [("good", "bad")], errors.DataFormatError, ["row 1", "a text", "'sentence'"]),
        ("pair", [("good", "bad"), "good"], errors.DataFormatError, ["row 2", "a pair of texts", "'other'"]),
        ("prompt", [7], errors.DataFormatError, ["row 1", "a text", "'mr'"]),
        ("plain", ["a"], errors.SettingError, ["prompt_column", "generate"]),
    ],
)
def test_rows_that_are_none_of_the_task(
    task: str, rows: Any, error: type[Exception], words: list[str], trained: dict[str, Trained]
):
    with pytest.raises(error) as caught:
        loaded(trained[task]).predict(rows)
    assert [word for word in words if word not in str(caught.value)] == []


def test_what_a_task_has_not(trained: dict[str, Trained]):
    text, number, prompt = (loaded(trained[task]) for task in ("text", "number", "prompt"))
    with pytest.raises(errors.SettingError, match="only causal-lm generates texts"):
        text.generate(["a"])
    with pytest.raises(errors.SettingError, match="beams is of texts"):
        text.predict(["good"], beams=2)
    with pytest.raises(errors.SettingError, match=r"'max_tokens'.*max_new_tokens"):
        prompt.generate(["a"], max_tokens=3)
    with pytest.raises(errors.SettingError, match="one text"):
        prompt.generate("a")
    for ready, row in ((number, "good"), (prompt, "a")):
        with pytest.raises(errors.SettingError, match="probabilities are of classes"):
            ready.predict([row], probabilities=True)
    with pytest.raises(errors.EmptyDataError, match="no column of answers"):
        text.evaluate([{"sentence": "good"}])


def test_a_frame_is_its_rows(trained: dict[str, Trained]):
    """A data frame of pandas iterates over the names of its columns."""

    class Frame:
        columns = ("sentence",)

        def to_dict(self, orient: str) -> list[dict[str, str]]:
            assert orient == "records"
            return [{"sentence": "good"}]

        def __iter__(self) -> Any:
            return iter(self.columns)

    ready = loaded(trained["text"])
    assert ready.predict(Frame()) == ready.predict(["good"])


def test_a_base_elsewhere_and_a_device_that_is_not_there(trained: dict[str, Trained]):
    one = trained["text"]
    with pytest.raises(errors.DataMissingError, match=r"text\.safetensors names 'encoder.*give model"):
        randbasis.load(one.where["file"])
    with pytest.raises(errors.SettingError, match=r"device must be auto, cpu.*'gpu'"):
        randbasis.load(one.folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(errors.SettingError, match="'cuda:1' is not on this machine"):
            randbasis.load(one.folder, device="cuda:1")


def test_a_task_of_a_newer_version_is_not_guessed(trained: dict[str, Trained], tmp_path: Path):
    from dataclasses import replace

    packed = read(trained["text"].where["file"])
    for change, message in (({"template": "x"}, "'template'.*upgrade"), ({"task": "ranking"}, "'ranking'.*unknown")):
        newer = replace(packed, spec=replace(packed.spec, task={**packed.spec.task, **change}))
        newer.write(tmp_path / "newer.safetensors", overwrite=True)
        with pytest.raises(errors.AdapterFilesError, match=message):
            randbasis.load(tmp_path / "newer.safetensors", trained["text"].base)


def test_without_a_task(trained: dict[str, Trained]):
    """A language model can do without; a classifier cannot, and the way out is told."""
    from dataclasses import replace

    def bare(task: str) -> Any:
        packed = read(trained[task].where["file"])
        return replace(packed, spec=replace(packed.spec, task={}))

    with pytest.raises(errors.AdapterFilesError, match=r"nothing describes the task.*training run.*PeftModel"):
        randbasis.load(bare("text"), trained["text"].base)
    one = trained["plain"]
    assert randbasis.load(bare("plain"), one.base).generate(["a"], max_new_tokens=4) == loaded(one).generate(
        ["a"], max_new_tokens=4
    )
    with pytest.raises(errors.SettingError, match=r"predict needs the column of the prompts|columns of the task"):
        randbasis.load(bare("plain"), one.base).predict(["a"])


def test_load_packed_takes_every_form(trained: dict[str, Trained]):
    """The same logits whatever is given; a folder is no packed file."""
    one = trained["prompt"]
    batch = AutoTokenizer.from_pretrained(one.base)(["ab"], return_tensors="pt")

    def logits(where: Any) -> torch.Tensor:
        model = randbasis.load_packed(AutoModelForCausalLM.from_pretrained(one.base), where)
        with torch.no_grad():
            return model(input_ids=batch["input_ids"]).logits

    expected = logits(one.where["file"])
    with AdapterStore(Path(one.where["file"]).parent / "some.db") as store:
        stored = store.get("of/prompt")
    for where in (Path(one.where["file"]), Path(one.where["file"]).read_bytes(), read(one.where["file"]), stored,
                  one.where["url"], one.where["store"], one.where["version"]):  # fmt: skip
        assert torch.equal(logits(where), expected)
    for where in (one.folder, "nowhere", randbasis.open_adapter(one.folder)):
        with pytest.raises(errors.PackedFileMissingError):
            logits(where)
