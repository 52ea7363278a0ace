"""One encoder under the paths that adapters of several tasks know it by, with a bank for each.

An adapter of embeddings was trained on the encoder itself, one of classes on a model that has the encoder inside and a
head behind it. The weights of the encoder are there once.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

from randbasis.adapter_file import PackedAdapter
from randbasis.bank import AdapterBank
from randbasis.errors import AdapterRefusedError, NotResidentError
from randbasis.store import StoredAdapter
from randbasis.train.pooled import PooledClassifier

EMBEDDING = "embedding"
_CLASSES = "sequence-classification"


class EncoderViews:
    """A bank that puts each adapter on the view that it was trained on.

    Args:
        encoder: of transformers, without a head.
        row_bytes: that adapters may take in all.
        expanded_bytes: that factors of adapters in use may take in all.
    """

    def __init__(self, encoder: Any, *, row_bytes: int, expanded_bytes: int):
        self.encoder = encoder
        models = {EMBEDDING: encoder, **_classifiers(encoder)}
        share: dict[str, Any] = {"row_bytes": row_bytes // len(models), "expanded_bytes": expanded_bytes // len(models)}
        self._banks = {name: AdapterBank(model.eval(), **share) for name, model in models.items()}
        self._view_of: dict[str, str] = {}

    def load(self, name: str, source: bytes | StoredAdapter, *, version: int | None = None, pin: bool = False) -> Any:
        """See :meth:`AdapterBank.load`.

        Raises:
            AdapterRefusedError: it was trained for a task that an encoder does not do here.
        """
        packed = source.packed() if isinstance(source, StoredAdapter) else PackedAdapter.from_bytes(source)
        view = _view(packed.spec.task)
        if view not in self._banks:
            raise AdapterRefusedError(
                f"{name!r} was trained for {packed.spec.task.get('task')!r} ({view}), which this encoder has no model "
                f"for; there are {', '.join(self._banks)}"
            )
        made = self._banks[view].load(name, source, version=version, pin=pin)
        before = self._view_of.get(name, view)
        self._view_of[name] = view
        if before != view and name in self._banks[before]:
            self._banks[before].unload(name)
        return made

    def unload(self, name: str) -> None:
        """See :meth:`AdapterBank.unload`."""
        self._bank(name).unload(name)
        self._view_of.pop(name, None)

    def lease(self, name: str) -> Any:
        """See :meth:`AdapterBank.lease`."""
        return self._bank(name).lease(name)

    def __contains__(self, name: object) -> bool:
        return any(name in bank for bank in self._banks.values())

    def stats(self) -> dict[str, float]:
        """The sums of all banks."""
        found: dict[str, float] = {}
        for bank in self._banks.values():
            for key, value in bank.stats().items():
                found[key] = found.get(key, 0) + value
        return found

    def placed(self, lease: Any | None) -> tuple[str, AdapterBank]:
        """The view of a leased adapter and its bank; of the base the encoder itself."""
        view = EMBEDDING if lease is None else _view(lease.resident.spec.task)
        return view, self._banks[view]

    def _bank(self, name: str) -> AdapterBank:
        view = self._view_of.get(name)
        if view is None:
            raise NotResidentError(f"no adapter {name!r} is resident; load it first")
        return self._banks[view]


def _view(task: Mapping[str, Any]) -> str:
    return f"pooling {task.get('pooling', 'model')}" if task.get("task") == _CLASSES else EMBEDDING


def _classifiers(encoder: Any) -> dict[str, nn.Module]:
    """Pooling → a classifier around the encoder. Its own head is never asked: each adapter brings one."""
    found: dict[str, nn.Module] = {}
    if type(encoder.config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        with torch.device("meta"):
            model = cast("Any", AutoModelForSequenceClassification).from_config(encoder.config)
        setattr(model, model.base_model_prefix, encoder)
        found["pooling model"] = _with_empty_head(model, encoder)
    for pooling in ("mean", "cls"):
        with torch.random.fork_rng(devices=()):
            found[f"pooling {pooling}"] = PooledClassifier(encoder.config, encoder, pooling)
    return found


def _with_empty_head(model: nn.Module, encoder: nn.Module) -> nn.Module:
    """Zeros for what the class has behind the encoder, where the encoder is."""
    first = next(encoder.parameters())
    for module in model.children():
        if module is not encoder:
            module.to_empty(device=first.device).to(first.dtype)
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    return model
