"""Runs on the processes that torchrun starts: the settings of each stand in a file, as JSON."""

import json
import sys
from pathlib import Path

import torch

from randbasis.errors import RandbasisError
from randbasis.train.run import train
from randbasis.train.settings import settings_from_words

torch.set_num_threads(1)
for words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    try:
        outcome = train(settings_from_words(words))
    except RandbasisError as error:
        if not error.told_elsewhere:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}), flush=True)
    else:
        if outcome.first:
            print(json.dumps(outcome.summary), flush=True)
