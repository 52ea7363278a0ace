"""Print docs/host-names.md, the page of the names of PEFT and transformers that the package relies on.

The page is written from the tables that are checked at import: `make docs` writes it, and a test compares.
"""

from randbasis.serve.host_names import ENGINE_NAMES, ENGINE_RANGE
from randbasis.train.host_names import TRAINER_NAMES
from randbasis.tuner.host_names import PEFT_NAMES, TESTED, TRANSFORMERS_NAMES, HostName

HEAD = """# Names of PEFT and transformers

PEFT is the host of every adapter, and transformers trains them. This package overrides some of their methods and
reaches into some of their inner names, which move between releases without notice. An override whose name moved would
never be called, silently; so each of these names is checked once, at import (those of training when training is first
used, those of serving when a server starts), and a missing one is a `RegistrationError` that names it, the version and
what to install.

Every pair of versions in {ranges} works in full, and is tested: `make test` on the lock, `make test-oldest` and
`make test-newest` on the ends. transformers 5.24 and later are allowed too, but their own adapter methods
(`model.add_adapter`, `set_adapter`, `save_pretrained` with an adapter, …) refuse every PEFT before 0.22, which is not
released: on such a pair those methods raise a `VersionPairError` that names a pair that works, and all else,
`get_peft_model` and `PeftModel.from_pretrained` first, works as elsewhere.
"""


def table(title: str, names: tuple[HostName, ...]) -> str:
    """One section of the page."""
    rows = [f"| `{one.module}.{one.name}` | {one.breaks} |" for one in names]
    return "\n".join([f"\n## {title}\n", "| name | what breaks when it moves |", "|---|---|", *rows])


if __name__ == "__main__":
    ranges = " and ".join(f"`{TESTED[name]}`" for name in ("transformers", "peft"))
    print(HEAD.format(ranges=ranges).rstrip())
    print(table("PEFT", PEFT_NAMES))
    print(table("transformers", TRANSFORMERS_NAMES))
    print(table("transformers and accelerate, in training", TRAINER_NAMES))
    print(table(f"{ENGINE_RANGE['transformers']}, in serving", ENGINE_NAMES))
