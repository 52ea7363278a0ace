"""Runs on the processes that torchrun starts: their settings stand in a file, as JSON; ``full`` fills the disk."""

import errno
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch

from randbasis.errors import RandbasisError
from randbasis.train import trainer
from randbasis.train.run import train
from randbasis.train.settings import settings_from_words

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

torch.set_num_threads(1)
for words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    writes = mock.Mock(side_effect=FULL if words.pop("full", False) else trainer.save_parameters)
    try:
        with mock.patch.object(trainer, "save_parameters", writes):
            outcome = train(settings_from_words(words))
    except RandbasisError as error:
        if not error.told_elsewhere:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}), flush=True)
    else:
        if outcome.first:
            print(json.dumps(outcome.summary), flush=True)
    assert os.environ["RANK"] == "0" or not writes.called, "every process has written the checkpoint of the first"
