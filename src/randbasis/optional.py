"""Optional dependencies: one that is not installed is told apart from one that is installed and broken."""

from collections.abc import Generator
from contextlib import contextmanager

from randbasis.errors import BrokenPackageError, MissingPackageError


@contextmanager
def needing(purpose: str, package: str, extra: str, *, distribution: str = "") -> Generator[None]:
    """Around the import of an optional package.

    Args:
        purpose: what needs it, for the message.
        package: as it is imported.
        extra: of this package, which installs it.
        distribution: what it is called where it is installed from, where that is another name.

    Raises:
        MissingPackageError: the package is not installed.
        BrokenPackageError: it is, and importing it failed; the message says of what.
    """
    name = distribution or package
    try:
        yield
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package:
            raise MissingPackageError(
                f"{purpose} needs {name}, which is not installed; install randbasis[{extra}]"
            ) from error
        raise BrokenPackageError(
            f"{purpose} needs {name}, which is there and cannot be imported ({type(error).__name__}: {error}); mend "
            f"that, or install {name} anew"
        ) from error
