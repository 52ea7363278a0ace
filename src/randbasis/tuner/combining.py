"""A new adapter from the coefficients of others with the same basis."""

from collections.abc import Mapping, Sequence
from typing import cast

from peft import PeftConfig

from randbasis.errors import AdapterNameError, CombinationError, near
from randbasis.tuner.config import RandbasisConfig
from randbasis.tuner.layer import RandbasisLinear


def check_combination(
    layers: Sequence[RandbasisLinear],
    configs: Mapping[str, PeftConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
) -> None:
    """Raise unless a weighted sum of the coefficients of adapters is an adapter.

    Raises:
        AdapterNameError: an adapter does not exist.
        CombinationError: the adapters differ in more than their coefficients, or the type has no meaning here.
    """
    for name in adapters:
        if name not in configs:
            raise AdapterNameError(f"Adapter {name} does not exist; {near(name, configs)}")
    if not adapters or len(adapters) != len(weights):
        raise CombinationError(
            f"weights must have one entry for each adapter, got {len(adapters)} adapters and {len(weights)} weights"
        )
    if combination_type != "linear":
        raise CombinationError(
            f"combination_type must be 'linear', got {combination_type!r}: other combinations of adapters have no "
            "coefficients on this basis; convert them with peft.convert_to_lora and combine the LoRA adapters"
        )
    for layer in layers:
        first = [(one.bound, one.part) for one in layer.matrices(adapters[0])]
        for name in adapters[1:]:
            if [(one.bound, one.part) for one in layer.matrices(name)] != first:
                raise CombinationError(
                    "adapters must share method, seed, law, rank and targets to be combined, "
                    f"{name!r} differs from {adapters[0]!r}: coefficients on different bases cannot be added; "
                    "convert both with peft.convert_to_lora and combine the LoRA adapters"
                )
    ties = {name: cast("RandbasisConfig", configs[name]).tie for name in adapters}
    if len(set(ties.values())) > 1:
        raise CombinationError(
            f"adapters must share coefficients over the same matrices to be combined, got tie={ties}; convert them "
            "with peft.convert_to_lora and combine the LoRA adapters"
        )
    biased = [name for name in adapters if cast("RandbasisConfig", configs[name]).bias != "none"]
    if biased:
        raise CombinationError(
            f"adapters must leave the biases of the base model alone to be combined, {biased[0]!r} trains them "
            "(bias in its configuration): a model has one set of biases; train it with bias='none'"
        )


def combine_coefficients(
    layers: Sequence[RandbasisLinear], adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """Write the weighted sum of the coefficients of adapters into an adapter that is there for it."""
    for layer in layers:
        layer.copy_streams(adapters[0], adapter_name)
        for index, one in enumerate(layer.matrices(adapter_name)):
            for name, target in layer.trained_coefficients(adapter_name, one).items():
                target.zero_()
                for source, weight in zip(adapters, weights, strict=True):
                    their = layer.matrices(source)[index]
                    target.add_(layer.trained_coefficients(source, their)[name], alpha=weight)
