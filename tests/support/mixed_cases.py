"""Models with many adapters, and what a mixed batch must give: each row as if it were alone."""

import torch
from peft import PeftModel
from tuner_cases import Case, add_adapter, outputs

BASE = "__base__"


def each_alone(model: PeftModel, batch: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    """Every row by itself, with its adapter set as the only one."""
    before = model.active_adapter
    rows = []
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        if name == BASE:
            with model.disable_adapter():
                rows.append(outputs(model, alone))
        else:
            model.set_adapter(name)
            rows.append(outputs(model, alone))
    model.set_adapter(before)
    return torch.cat(rows)


def many_adapters(case: Case, count: int, **options: object) -> PeftModel:
    model = case.adapted(**options)
    for seed in range(1, count):
        add_adapter(model, f"number_{seed}", case.config(**options), seed + 1)
    return model
