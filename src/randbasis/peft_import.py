"""Registration with PEFT as soon as both packages are imported, in either order, and not before.

PEFT loads torch and transformers, which takes seconds: a program that keeps adapters in a store, or prints its help,
must not wait for them. So ``import randbasis`` registers at once where PEFT is imported already. Otherwise it leaves
word with Python's import system: the loader of PEFT, once it has run, registers. Asking for any name of ours that works
on PEFT imports PEFT, and registers too.

An entry of ``sys.meta_path`` is what survives every way to PEFT: a submodule's import, transformers' own, a pickle's.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from randbasis.errors import RegistrationError

HOST = "peft"


def register_with_peft() -> None:
    """Register now where PEFT is imported, else when it is; repeated calls change nothing.

    Raises:
        RegistrationError: PEFT is imported, and is one that the methods cannot be registered with.
    """
    if sys.modules.get(HOST) is not None:
        import_module("randbasis.tuner")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds PEFT where the other finders do, with a loader that registers afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != HOST:
            return None
        for finder in [one for one in sys.meta_path if one is not self and hasattr(one, "find_spec")]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None


class _RegisteringLoader(Loader):
    """PEFT's own loader, and registration once it has run."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # PEFT itself sees nothing of this
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:  # a failed import of PEFT leaves it there for the next
            sys.meta_path.remove(self._finder)
        try:
            import_module("randbasis.tuner")
        except RegistrationError as error:
            # PEFT is not ours to break: whoever asks for a name of ours gets the error itself.
            warnings.warn(f"randbasis is not registered with PEFT: {error}", RuntimeWarning, stacklevel=2)
