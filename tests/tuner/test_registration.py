"""Registration with PEFT: a real member of `PeftType`, once."""

import copy
import pickle

import peft
import pytest
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from tuner_cases import CASES, OPTIONS, adapted_layers, make_config, seeded, tiny_llama

import randbasis
from randbasis.tuner.model import register
from randbasis.tuner.registration import PEFT_TYPE, PREFIX, TYPE_NAME, add_peft_type


def test_the_type_is_a_member_in_every_way():
    assert isinstance(PEFT_TYPE, PeftType)
    assert PEFT_TYPE is PeftType.RANDBASIS is PeftType("RANDBASIS") is PeftType["RANDBASIS"]
    assert PEFT_TYPE in PeftType
    assert PEFT_TYPE in list(PeftType)
    assert (PEFT_TYPE.name, PEFT_TYPE.value, str.__str__(PEFT_TYPE)) == ("RANDBASIS",) * 3
    assert PEFT_TYPE == "RANDBASIS"
    assert hash(PEFT_TYPE) == hash("RANDBASIS")
    assert pickle.loads(pickle.dumps(PEFT_TYPE)) is PEFT_TYPE
    assert copy.deepcopy(PEFT_TYPE) is PEFT_TYPE


def test_the_members_of_peft_are_as_they_were():
    assert PeftType.LORA is PeftType("LORA")
    assert len(set(PeftType)) == len(list(PeftType)) == len(PeftType.__members__)


def test_the_mappings_of_peft():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] is randbasis.RandbasisConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] is randbasis.RandbasisModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] == PREFIX == f"{TYPE_NAME.lower()}_"


def test_registering_again_changes_nothing():
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register()
    assert add_peft_type(TYPE_NAME) is PEFT_TYPE
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)) == before


@pytest.mark.parametrize("case", CASES)
def test_names_of_what_an_adapter_adds_start_with_the_prefix(case):
    """transformers finds the keys of an adapter by this prefix."""
    model, plain = case.adapted(), set(case.base().state_dict())
    added = {n.removeprefix("base_model.model.").replace(".base_layer", "") for n in model.state_dict()} - plain
    assert added
    assert all(f".{PREFIX}" in f".{name}" and name.endswith(".default.weight") for name in added)


@pytest.mark.parametrize("method", OPTIONS)
def test_status_of_peft(method):
    model = get_peft_model(seeded(tiny_llama), make_config(method, ["q_proj"]))
    status = model.get_model_status()
    assert status.peft_types == {"default": "RANDBASIS"}
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default"]
    assert status.enabled
    assert status.num_adapter_layers == len(adapted_layers(model)) == 2
    assert {layer.module_type for layer in model.get_layer_status()} == {"randbasis.RandbasisLinear"}


@pytest.mark.parametrize("method", OPTIONS)
def test_our_configurations_are_configurations_of_peft(method):
    config = make_config(method, ["q_proj"])
    assert isinstance(config, PeftConfig)
    assert config.peft_type is PEFT_TYPE
    assert not config.is_prompt_learning
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_version_of_peft_is_one_that_is_supported():
    assert (0, 20) <= tuple(int(part) for part in peft.__version__.split(".")[:2]) < (0, 22)
