"""Names, tags and numbers that a store takes from its users."""

import re
import unicodedata
from collections.abc import Iterable

from randbasis.adapter_file.paths import check_name
from randbasis.errors import StoreNameError, StoreOptionError, UnsafeNameError

NAME_BYTES = 255
"""Longest name of an adapter, in bytes of UTF-8."""
TAG_BYTES = 64
"""Longest tag, in bytes of UTF-8."""
TAG_LIMIT = 64
"""Most tags of one version."""

_VERSION = re.compile(r"@\d+$")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_adapter_name(name: str) -> str:
    """A name under which an adapter may stand: a relative path of plain words.

    Raises:
        StoreNameError: it is empty, too long, an absolute path, climbs with ``..``, or has control characters, blanks
            around it, empty components, characters that are not composed (NFC), or ends as ``NAME@VERSION`` does.
    """
    checked = _checked(name, "name", NAME_BYTES)
    if _VERSION.search(checked):
        raise _refused("name", "without @ and a number at its end, which store:NAME@VERSION takes for a version", name)
    return checked


def check_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Tags, sorted, each once.

    Raises:
        StoreNameError: a tag is one that :func:`check_adapter_name` would refuse, or there are too many.
    """
    if isinstance(tags, str):
        raise StoreNameError(f"tags must be a list of words, got the text {tags!r}; write [{tags!r}]")
    found = tuple(sorted({_checked(tag, "tag", TAG_BYTES) for tag in tags}))
    if len(found) > TAG_LIMIT:
        raise StoreNameError(f"tags must be at most {TAG_LIMIT}, got {len(found)}; put what they say into the name")
    return found


def check_digest(digest: str, what: str = "digest") -> bytes:
    """A SHA-256 in hexadecimal as its 32 bytes.

    Raises:
        StoreOptionError: it is anything else.
    """
    if not _DIGEST.fullmatch(digest):
        raise StoreOptionError(f"{what} must be 64 hexadecimal digits, got {digest!r}; `randbasis store list` has them")
    return bytes.fromhex(digest)


def check_count(value: int, what: str, least: int = 1, most: int = (1 << 63) - 1) -> int:
    """A whole number in a range.

    Raises:
        StoreOptionError: it is not one.
    """
    if type(value) is not int or not least <= value <= most:
        raise StoreOptionError(
            f"{what} must be a whole number from {least} to {most}, got {value!r}; give one of these"
        )
    return value


def _checked(name: str, what: str, longest: int) -> str:
    try:
        check_name(name, f"the {what}", "store")
    except UnsafeNameError as error:
        rule = "a relative path without '..' and control characters"
        raise _refused(what, rule, name) from error
    if len(name.encode()) > longest:
        raise _refused(what, f"at most {longest} bytes long", name)
    if name != name.strip() or not name.isprintable():
        raise _refused(what, "printable, without blanks around it", name)
    if {"", "."} & {*re.split(r"[/\\]", name)}:
        raise _refused(what, "words joined by single slashes", name)
    if unicodedata.normalize("NFC", name) != name:
        raise _refused(what, "in composed characters (Unicode NFC), so that it cannot stand twice", name)
    return name


def _refused(what: str, rule: str, name: str) -> StoreNameError:
    shown = repr(name) if len(name) <= 100 else f"{name[:100]!r}… of {len(name.encode(errors='replace'))} bytes"
    return StoreNameError(
        f"{what} must be {rule}, got {shown}; use letters, digits and any of - _ . / as in 'team/user-1'"
    )
