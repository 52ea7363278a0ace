"""Every task that there is, by its name."""

from randbasis.adapters.saved import SavedAdapter
from randbasis.errors import AdapterFilesError, near
from randbasis.train.causal_lm import CausalLanguage
from randbasis.train.classification import TextClassification
from randbasis.train.embedding import Embedding
from randbasis.train.images import ImageClassification
from randbasis.tuner.saved_files import BASE_BITS

TrainedTask = CausalLanguage | TextClassification | ImageClassification | Embedding

TASK_CLASSES: dict[
    str, type[CausalLanguage] | type[TextClassification] | type[ImageClassification] | type[Embedding]
] = {task.name: task for task in (CausalLanguage, TextClassification, ImageClassification, Embedding)}


def described_task(saved: SavedAdapter, name: str) -> TrainedTask:
    """The task that an adapter was trained for, on the base ``name``.

    Raises:
        AdapterFilesError: it is unknown here, or its description lacks something or says more than this version knows.
    """
    description = saved.task
    kind = TASK_CLASSES.get(description.get("task", ""))
    if kind is None:
        raise AdapterFilesError(
            f"{saved.where} was trained for the task {description.get('task')!r}, which is unknown here; "
            f"{near('', TASK_CLASSES)}"
        )
    try:
        task = kind.from_description(description, name)
    except KeyError as error:
        if error.args and error.args[0] in description:
            raise
        raise AdapterFilesError(f"the task of {saved.where} lacks {error}; was its task.json edited?") from error
    unknown = sorted(description.keys() - {BASE_BITS, *task.description()})
    if unknown:
        raise AdapterFilesError(
            f"the task of {saved.where} says {unknown[0]!r}, which this version of randbasis does not know, so that "
            "its answers could be others; upgrade it"
        )
    return task
