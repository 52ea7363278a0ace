"""What a forward pass of one layer costs before any arithmetic: calls of Python are counted, not timed."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from tuner_cases import adapted_layers

import randbasis
from randbasis import NolaConfig, PrancConfig, RandLoraConfig, VeraConfig
from randbasis.tuner.config import LoraXsConfig

PACKAGE = str(Path(randbasis.__file__).parent)
CALLS, CHANGES = 45, 18
CONFIGS = {
    "nola": NolaConfig(r=8, num_basis=64, alpha=8.0, target_modules=["0"]),
    "vera": VeraConfig(r=64, target_modules=["0"]),
    "randlora": RandLoraConfig(r=8, target_modules=["0"]),
    "pranc": PrancConfig(num_basis=64, target_modules=["0"]),
    "loraxs": LoraXsConfig(r=8, target_modules=["0"]),
}


def files_of_calls(run):
    """The file of each call into the package, in order; what its dataclasses write for themselves counts too."""
    found = []

    def note(frame, event, _):
        file = frame.f_code.co_filename
        if event == "call" and (file.startswith(PACKAGE) or file == "<string>"):
            found.append(file)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("tokens", [64, 4096])
@pytest.mark.parametrize("method", CONFIGS)
def test_calls_of_a_training_pass(method, tokens):
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), CONFIGS[method]).train()
    (layer,) = adapted_layers(model).values()
    x = torch.randn(tokens, 64, requires_grad=True)
    layer(x)
    files = files_of_calls(lambda: layer(x))
    assert 0 < len(files) <= CALLS
    assert sum(one != other for one, other in itertools.pairwise(files)) <= CHANGES
