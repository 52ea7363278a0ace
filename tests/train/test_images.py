"""Images: layouts, pixels against the model's own processor, other sizes, few shots."""

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from randbasis.errors import DataFormatError, DataMissingError, EmptyDataError, LabelError, SettingError
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, prepare, train
from randbasis.train import images as images_module
from randbasis.train.images import ImageClassification, read_images
from randbasis.use import UseSettings, predict


@pytest.fixture
def settings(vision_model: str, image_folder: Path, tmp_path: Path) -> TrainSettings:
    loop = LoopSettings(
        max_steps=20, batch_size=8, learning_rate=1e-2, head_learning_rate=5e-2, eval_every=10, threads=1
    )
    return TrainSettings("image-classification", vision_model, DataSettings(image_folder), tmp_path / "run",
                         adapter=AdapterSettings("lora", rank=2), loop=loop)  # fmt: skip


def zip_of(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, prefix + str(file.relative_to(folder)))
        archive.writestr("__MACOSX/train/red/._0.png", b"x")
        archive.writestr("README.txt", b"x")
    return path


def test_folder_and_zip_list_the_same(image_folder: Path, tmp_path: Path):
    folder, packed = read_images(image_folder), read_images(zip_of(image_folder, tmp_path / "images.zip", "top/"))
    assert {name: len(table.rows) for name, table in folder.items()} == {"train": 16, "test": 8}
    for name, table in folder.items():
        assert (
            packed[name].column("label")
            == table.column("label")
            == ["blue"] * (len(table.rows) // 2) + ["red"] * (len(table.rows) // 2)
        )


def test_classes_without_splits(image_folder: Path):
    assert list(read_images(image_folder / "train")) == ["train"]


def test_pixels_against_the_models_own_processor(settings: TrainSettings, image_folder: Path, vision_model: str):
    prepared = prepare(settings)
    file = image_folder / "train" / "blue" / "0.png"
    with Image.open(file) as image:
        expected = AutoImageProcessor.from_pretrained(vision_model)([image], return_tensors="pt")["pixel_values"]
    batch = prepared.task.collate(prepared.train[:1])
    assert torch.allclose(batch["pixel_values"], expected, atol=1e-6)
    assert batch["labels"].tolist() == [0]


def test_images_that_do_not_fit_in_memory_are_decoded_by_batch(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch,
                                                               image_folder: Path, tmp_path: Path):  # fmt: skip
    packed = replace(settings, data=DataSettings(zip_of(image_folder, tmp_path / "images.zip")))
    kept = prepare(packed)
    monkeypatch.setattr(images_module, "CACHE_BYTES", 0)
    lazy = prepare(packed)
    assert isinstance(lazy.train[0]["image"], images_module.ImageRef)
    assert isinstance(kept.train[0]["image"], np.ndarray)
    one, other = kept.task.collate(kept.train[:5]), lazy.task.collate(lazy.train[:5])
    assert torch.equal(one["pixel_values"], other["pixel_values"])


@pytest.mark.parametrize("size", [None, 16, 48])
def test_another_size(settings: TrainSettings, size: int | None):
    outcome = train(replace(settings, image_size=size))
    assert outcome.summary["after"]["accuracy"] == 1.0
    answers = predict(UseSettings(adapter=outcome.output, data=settings.data.train, split="train", threads=1))
    assert [answer["prediction"] for answer in answers] == [answer["label"] for answer in answers]
    assert all(0.5 < answer["probability"] <= 1 for answer in answers)


def test_the_head_is_fresh_and_depends_on_the_seed_alone(settings: TrainSettings):
    task = prepare(settings).task
    before = torch.get_rng_state()
    heads = [task.load_model(settings.model, dtype="float32", seed=seed).classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (2, 16)


def test_flip_mirrors_some(settings: TrainSettings):
    prepared = prepare(replace(settings, flip=True))
    examples = list(prepared.train)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mirrored = prepared.task.training_collate(examples)["pixel_values"]
    plain = prepared.task.collate(examples)["pixel_values"]
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(mirrored, plain, strict=True)]
    assert [torch.equal(a, b) for a, b in zip(mirrored, plain, strict=True)] == [not flip for flip in flipped]
    assert 0 < sum(flipped) < len(flipped)


def test_shots_and_held_out_share(settings: TrainSettings, image_folder: Path):
    data = DataSettings(image_folder / "train", eval_fraction=0.25, shots=3)
    prepared = prepare(replace(settings, data=data))
    assert sorted(e["label"] for e in prepared.train) == [0, 0, 0, 1, 1, 1]
    assert len(prepared.eval) == 4


def test_bad_archives(settings: TrainSettings, tmp_path: Path, image_folder: Path):
    with pytest.raises(DataMissingError, match="does not exist"):
        read_images(tmp_path / "nothing")
    (tmp_path / "file.zip").write_bytes(b"PK no")
    with pytest.raises(DataFormatError, match="neither a folder nor a zip"):
        read_images(tmp_path / "file.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptyDataError, match="holds no images"):
        read_images(tmp_path / "empty")
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.png").write_bytes((image_folder / "train" / "red" / "0.png").read_bytes())
    with pytest.raises(DataFormatError, match="not directly in the folder of its class"):
        read_images(flat)
    with pytest.raises(EmptyDataError, match="no split 'dev'"):
        predict(UseSettings(adapter=train(settings).output, data=image_folder, split="dev"))


def test_a_broken_image_and_an_unseen_class(settings: TrainSettings, tmp_path: Path, image_folder: Path):
    broken = tmp_path / "broken"
    for label in ("red", "blue"):
        (broken / label).mkdir(parents=True)
        (broken / label / "0.png").write_bytes(b"\x89PNG no image")
    with pytest.raises(DataFormatError, match=r"0\.png is not a readable image"):
        prepare(replace(settings, data=DataSettings(broken, eval=image_folder)))
    task = prepare(settings).task
    assert isinstance(task, ImageClassification)
    green = tmp_path / "green"
    (green / "green").mkdir(parents=True)
    (green / "green" / "0.png").write_bytes((image_folder / "train" / "red" / "0.png").read_bytes())
    with pytest.raises(LabelError, match=r"label 'green' of .* was not seen in training"):
        task.encode(read_images(green)["train"], training=False)


def test_a_share_to_hold_out_where_a_split_is_held_out_already(settings: TrainSettings, image_folder: Path):
    with pytest.raises(SettingError, match=r"eval_fraction 0\.3 has no meaning where .* is held out already"):
        prepare(replace(settings, data=DataSettings(image_folder, eval_fraction=0.3)))
