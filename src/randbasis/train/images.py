"""Classes from images, in a folder or a zip with a folder for each class."""

import io
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # its public name may ask for torchvision

from randbasis.errors import DataFormatError, DataMissingError, EmptyDataError, LabelError, SettingError, near
from randbasis.optional import needing
from randbasis.train.classification import class_answers, class_metrics, class_scores, classes_of, logits_of
from randbasis.train.machine import Quantized
from randbasis.train.model_reading import explained, heads_of, read_model
from randbasis.train.randomness import confined_randomness
from randbasis.train.settings import Source, TrainSettings
from randbasis.train.tabular import Table
from randbasis.train.task import Batch, Example, Task

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TRAIN_SPLITS = ("train", "training")
CACHE_BYTES = 2**31
EVAL_SPLITS = ("val", "valid", "validation", "dev", "eval", "test", "testing")

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class ImageRef:
    """One image: a file, or a member of a zip."""

    path: Path
    member: str | None = None

    def read(self, archives: dict[Path, zipfile.ZipFile]) -> bytes:
        """Its bytes; ``archives`` are the zips that are open."""
        return self.path.read_bytes() if self.member is None else archives[self.path].read(self.member)

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"


@dataclass(frozen=True, eq=False)
class ImageAtHand:
    """One image of PIL, in memory."""

    image: Any

    def __str__(self) -> str:
        return f"image of {self.image.size} pixels in memory"


ImageSource = ImageRef | ImageAtHand


def image_source(value: object) -> ImageSource:
    """An image from what a caller gives for one: a path, or an image of PIL.

    Raises:
        DataMissingError: there is no such file.
        DataFormatError: it is something else.
    """
    if isinstance(value, ImageRef | ImageAtHand):
        return value
    if isinstance(value, str | Path):
        if not Path(value).is_file():
            raise DataMissingError(f"image {str(value)!r} is not a file; give the path of an image")
        return ImageRef(Path(value))
    if callable(getattr(value, "convert", None)):
        return ImageAtHand(value)
    raise DataFormatError(f"an image must be a path or an image of PIL, got a {type(value).__name__}; open it with PIL")


def read_images(path: str | Path) -> dict[str, Table]:
    """List the images of a folder or zip as tables of the columns ``image`` and ``label``.

    Args:
        path: holds ``<class>/<image>``, or ``<split>/<class>/<image>`` where every top folder is a known split.

    Returns:
        ``{"train": table}`` or a table a split, rows in the order of their names.

    Raises:
        DataMissingError: there is no such folder or zip.
        DataFormatError: it is neither, or images lie outside class folders.
        EmptyDataError: it has no images.
    """
    path = Path(path)
    if not path.exists():
        raise DataMissingError(
            f"data {str(path)!r} does not exist; give a folder or zip with a folder of images for each class"
        )
    found: dict[str, list[dict[str, Any]]] = {}
    entries = _entries(path)
    split = _has_splits(entries)
    for parts, reference in entries:
        if len(parts) != (3 if split else 2):
            raise DataFormatError(
                f"image {str(reference)!r} is not directly in the folder of its class; the layout is "
                "<class>/<image> or <split>/<class>/<image>"
            )
        found.setdefault(parts[0].lower() if split else "train", []).append({"image": reference, "label": parts[-2]})
    if not found:
        raise EmptyDataError(f"{path.name} holds no images ({', '.join(SUFFIXES)})")
    return {
        name: Table(("image", "label"), rows, f"{path.name} ({name})" if split else path.name)
        for name, rows in found.items()
    }


def image_tables(
    train: Source | tuple[Source, ...],
    eval: Source | tuple[Source, ...] | None = None,
    splits: Sequence[str] = EVAL_SPLITS,
) -> tuple[Table, Table | None]:
    """The images to train on, and those to evaluate on: of ``eval``, else of a split of the same archive.

    Args:
        train: folder or zip, as for :func:`read_images`.
        eval: another one; None where the first has both.
        splits: names of those to evaluate on, the preferred first.

    Raises:
        SettingError: either is several.
        EmptyDataError: there is no split to train on.
        RandbasisError: as :func:`read_images`.
    """
    found = read_images(_one_archive(train))
    trained = next((name for name in found if name not in EVAL_SPLITS), None)
    if trained is None:
        raise EmptyDataError(f"{train} holds only {', '.join(found)}; a split named train is needed")
    if eval is not None:
        return found[trained], held_images(eval, splits)
    return found[trained], next((found[name] for name in splits if name in found), None)


def held_images(source: Source | tuple[Source, ...], splits: Sequence[str] = EVAL_SPLITS) -> Table:
    """The images to evaluate on of an archive that was named for them; of one without such a split its first."""
    found = read_images(_one_archive(source))
    return found[next((name for name in splits if name in found), next(iter(found)))]


def _one_archive(source: Source | tuple[Source, ...]) -> Source:
    if isinstance(source, tuple):
        raise SettingError(f"data of images must be one folder or zip, got {len(source)}")
    return source


def read_unsorted(path: str | Path) -> Table | None:
    """Images whose classes nobody told, as a table of the column ``image`` alone.

    Args:
        path: of one image, or of a folder or zip of images, in whatever folders.

    Returns:
        The table, rows in the order of their names; None where the images lie in folders of classes, as
        :func:`read_images` wants them.

    Raises:
        DataMissingError: there is nothing.
        DataFormatError: it is none of these.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return Table(("image",), [{"image": ImageRef(path)}], path.name)
    if not path.exists():
        raise DataMissingError(f"data {str(path)!r} does not exist; give an image, or a folder or zip of images")
    entries = _entries(path)
    deep = 3 if _has_splits(entries) else 2
    if all(len(parts) == deep for parts, _ in entries):
        return None
    return Table(("image",), [{"image": reference} for _, reference in entries], path.name)


def _has_splits(entries: Sequence[tuple[tuple[str, ...], ImageRef]]) -> bool:
    tops = {parts[0].lower() for parts, _ in entries}
    return bool(tops) and tops <= {*TRAIN_SPLITS, *EVAL_SPLITS}


def _entries(path: Path) -> list[tuple[tuple[str, ...], ImageRef]]:
    """Paths as parts below the root, and what is there; hidden files are left out."""
    if path.is_dir():
        files = [(file.relative_to(path).parts, ImageRef(file)) for file in path.rglob("*") if file.is_file()]
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            files = [
                (tuple(Path(name).parts), ImageRef(path, name)) for name in archive.namelist() if not name.endswith("/")
            ]
    else:
        raise DataFormatError(f"data {str(path)!r} is neither a folder nor a zip of images")
    kept = [
        (parts, ref)
        for parts, ref in files
        if parts[-1].lower().endswith(SUFFIXES) and not any(part.startswith((".", "__MACOSX")) for part in parts)
    ]
    kept.sort(key=lambda entry: entry[0])
    while kept and len(kept[0][0]) > 2 and len({parts[0] for parts, _ in kept}) == 1 and not _is_split(kept[0][0][0]):
        kept = [(parts[1:], ref) for parts, ref in kept]
    return kept


def _is_split(name: str) -> bool:
    return name.lower() in (*TRAIN_SPLITS, *EVAL_SPLITS)


class ImageClassification(Task):
    """Image classification with a fresh head.

    Args:
        processor: the image processor of the base.
        labels: names of the classes in the order of the logits.
        image_size: side in pixels, ``None`` for the processor's own.
        flip: mirror half of the training images, drawn from torch's current generator.
    """

    name = "image-classification"
    peft_task_type = None
    auto_class = "AutoModelForImageClassification"

    def __init__(self, processor: Any, labels: tuple[str, ...], image_size: int | None, flip: bool = False):
        self.processor = processor
        self.labels = labels
        self.image_size = image_size
        self.flip = flip
        self.metric_names = class_metrics(len(labels))
        self.interpolate = False
        self.drawn: list[str] = []
        self.choose_metric(None)

    @classmethod
    def prepare(cls, settings: TrainSettings, table: Table) -> "ImageClassification":
        """The task as the training images imply it."""
        labels = classes_of(table.column("label"), settings.data, table.source)
        if labels is None:
            raise LabelError("images are sorted into classes; label_kind number does not apply")
        task = cls(_processor(settings.model), labels, settings.image_size, settings.flip)
        task.choose_metric(settings.loop.metric)
        return task

    @classmethod
    def from_description(cls, description: dict[str, Any], model: str) -> "ImageClassification":
        """The task that an adapter directory describes, on the base ``model``."""
        return cls(_processor(model), tuple(description["labels"]), description["image_size"])

    def description(self) -> dict[str, Any]:
        """See :meth:`Task.description`."""
        return {"task": self.name, "labels": list(self.labels), "image_size": self.image_size}

    def load_model(self, name: str, *, dtype: str, seed: int, quantized: Quantized | None = None) -> nn.Module:
        """See :meth:`Task.load_model`."""
        names = dict(enumerate(self.labels))
        with confined_randomness(seed):
            model, self.drawn = read_model(
                AutoModelForImageClassification,
                name,
                dtype,
                quantized=quantized,
                id2label=names,
                label2id={label: i for i, label in names.items()},
            )
            self.interpolate = "interpolate_pos_encoding" in signature(model.forward).parameters
            for head in heads_of(model):
                model.get_submodule(head).apply(_draw_head)
        return model

    def head_modules(self, model: nn.Module) -> list[str]:
        """See :meth:`Task.head_modules`."""
        return heads_of(model, self.drawn)

    def encode(self, table: Table, *, training: bool) -> list[Example]:
        """See :meth:`Task.encode`; pixels are decoded once where they fit in ``CACHE_BYTES``, else for each batch."""
        references = [image_source(value) for value in table.column("image")]
        images: Sequence[Any] = references
        if len(references) * 3 * (self.image_size or 224) ** 2 <= CACHE_BYTES:
            images = self._pixels(references)
        examples: list[Example] = [{"image": image} for image in images]
        if training or "label" in table.columns:
            for example, reference, value in zip(examples, references, table.column("label"), strict=True):
                if value not in self.labels:
                    raise LabelError(
                        f"label {value!r} of {reference} was not seen in training; {near(value, self.labels)}"
                    )
                example["label"] = self.labels.index(value)
        return examples

    def _pixels(self, references: Sequence[ImageSource]) -> list[Pixels]:
        """Decoded and resized images, uint8 ``[channels, height, width]``."""
        size = {"size": {"height": self.image_size, "width": self.image_size}} if self.image_size else {}
        images: list[Pixels] = []
        with ExitStack() as stack:
            archives = {
                path: stack.enter_context(zipfile.ZipFile(path))
                for path in {r.path for r in references if isinstance(r, ImageRef) and r.member}
            }
            for reference in references:
                picture = _decode(reference, archives)
                values = self.processor([picture], do_rescale=False, do_normalize=False, return_tensors="np", **size)
                images.append(np.clip(np.rint(values["pixel_values"][0]), 0, 255).astype(np.uint8))
        return images

    def collate(self, examples: Sequence[Example]) -> Batch:
        """See :meth:`Task.collate`."""
        images = [example["image"] for example in examples]
        if isinstance(images[0], ImageRef | ImageAtHand):
            images = self._pixels(images)
        pixels = torch.from_numpy(np.stack(images)).float()
        if self.processor.do_rescale:
            pixels *= self.processor.rescale_factor
        if self.processor.do_normalize:
            mean, std = (
                torch.tensor(values).view(1, -1, 1, 1)
                for values in (self.processor.image_mean, self.processor.image_std)
            )
            pixels = (pixels - mean) / std
        batch: Batch = {"pixel_values": pixels}
        if self.interpolate:
            batch["interpolate_pos_encoding"] = True
        if "label" in examples[0]:
            batch["labels"] = torch.tensor([example["label"] for example in examples])
        return batch

    def training_collate(self, examples: Sequence[Example]) -> Batch:
        """As :meth:`collate`, mirrored by chance with ``flip``."""
        batch = self.collate(examples)
        if self.flip:
            mirrored = torch.rand(len(examples)) < 0.5
            batch["pixel_values"][mirrored] = batch["pixel_values"][mirrored].flip(-1)
        return batch

    def score(self, model: nn.Module, examples: Sequence[Example], batch_size: int) -> dict[str, float]:
        """Loss, accuracy, Matthews' coefficient."""
        logits = logits_of(self, model, examples, batch_size)
        return class_scores(logits, [example["label"] for example in examples])

    def predict(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int, *, probabilities: bool = False
    ) -> list[dict[str, Any]]:
        """The label and its probability."""
        return class_answers(logits_of(self, model, examples, batch_size), self.labels, every=probabilities)


def _processor(model: str) -> Any:
    with explained(model, "image processor"):
        return cast(Any, AutoImageProcessor).from_pretrained(model)


def _decode(reference: ImageSource, archives: dict[Path, zipfile.ZipFile]) -> Any:
    if isinstance(reference, ImageAtHand):
        return reference.image.convert("RGB")
    with needing("reading images", "PIL", "train", distribution="pillow"):
        from PIL import Image
    try:
        with Image.open(io.BytesIO(reference.read(archives))) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataFormatError(f"{reference} is not a readable image: {error}") from error


def _draw_head(module: nn.Module) -> None:
    """A fresh linear layer, whether or not the checkpoint had one of the same shape."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if cast(Any, module.bias) is not None:
            nn.init.zeros_(module.bias)
