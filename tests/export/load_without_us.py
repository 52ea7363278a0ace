"""Run by itself: load exported LoRA directories with plain PEFT, where this package cannot be imported.

Arguments: a file of torch with cases, each with its class of transformers, base, adapter and inputs; and the file of
answers to write.
"""

import sys
import warnings

import torch
import transformers
from peft import LoraConfig, PeftModel

sys.modules["randbasis"] = None  # type: ignore[assignment]
torch.set_num_threads(1)
cases = torch.load(sys.argv[1])
answers = {}
for name, case in cases.items():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(adapter keys|fan_in_fan_out)")
        base = getattr(transformers, case["auto"]).from_pretrained(case["base"], dtype=torch.float32, **case["options"])
        model = PeftModel.from_pretrained(base, case["adapter"]).eval()
    assert isinstance(model.peft_config["default"], LoraConfig)
    with torch.no_grad():
        answers[name] = model(**case["inputs"])[0]
assert not any(name.startswith("randbasis.") for name in sys.modules)
torch.save(answers, sys.argv[2])
