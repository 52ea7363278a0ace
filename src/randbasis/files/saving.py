"""What a write that failed raises: one class, one message, whatever library wrote."""

import errno
from collections.abc import Callable, Generator
from contextlib import contextmanager

from safetensors import SafetensorError

from randbasis.errors import RandbasisError, SaveError
from randbasis.files.locations import Location

KEPT = "what was there before is kept"
_FULL = ("No space left", "disk is full")
"""Words of a full disk: of the operating system, of SQLite."""
_ZIP_WRITER = ("inline_container", "PytorchStreamWriter", "iostream")
"""Words of torch's zip writer, which tells of a full disk by a RuntimeError and not by its cause."""


@contextmanager
def saving(target: Location, *, kept: str = KEPT, undo: Callable[[], None] | None = None) -> Generator[None]:
    """Turn what a failed write raises into one message.

    Args:
        target: what is being written.
        kept: what is there now, for the message.
        undo: removes what was written by half.

    Raises:
        SaveError: the operating system refused.
    """
    try:
        yield
    except RandbasisError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _ZIP_WRITER):
            raise
        if undo is not None:
            undo()
        raise not_saved(target, error, kept) from error


def not_saved(target: Location, error: Exception, kept: str = KEPT) -> SaveError:
    """The error to raise from that of a library.

    Args:
        target: what was to be written.
        error: of the library.
        kept: what is there now, for the message.
    """
    number = getattr(error, "errno", None) or errno.EIO
    if number == errno.ENOSPC or any(word in str(error) for word in _FULL):
        number, reason = errno.ENOSPC, f"the disk is full ({error}); make room"
    elif isinstance(error, RuntimeError):
        reason = f"{error}; is the disk full? make room"
    else:
        reason = f"{error}; check the folder and its rights"
    return SaveError(number, f"{target} could not be written: {reason}; {kept}")
