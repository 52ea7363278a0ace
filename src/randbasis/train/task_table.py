"""Every task that there is, by its name."""

from randbasis.train.causal_lm import CausalLanguage
from randbasis.train.classification import TextClassification
from randbasis.train.images import ImageClassification

TrainedTask = CausalLanguage | TextClassification | ImageClassification

TASK_CLASSES: dict[str, type[CausalLanguage] | type[TextClassification] | type[ImageClassification]] = {
    task.name: task for task in (CausalLanguage, TextClassification, ImageClassification)
}
