"""Whether the hub answers, asked once and briefly before anything is fetched from it.

transformers asks for every file of a model by itself, and for each that is not in the cache six times in 46 seconds,
also where there is no network at all. A hub that answers, whatever it says, is left to that patience.
"""

import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub import constants, get_session, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from randbasis.errors import RemoteError

PATIENCE = 5.0
"""Seconds to wait for an answer."""
ATTEMPTS = 2
"""How often a hub is asked that refuses sooner."""
PAUSE = 1.0
"""Seconds between two attempts."""
MEMORY = 60.0
"""Seconds for which a hub that did not answer is not asked again; one that did never is."""

# httpx, or the fork of it that the installed hub client uses: connections that fail are of this class alone.
_CLIENT_ERROR = cast("type[Exception]", HfHubHTTPError.__bases__[0])
_answers: set[str] = set()
_silent: dict[str, tuple[float, str]] = {}


def why_unreachable() -> str | None:
    """Why the hub cannot be reached; ``None`` where it answers, or nobody wants it asked (``HF_HUB_OFFLINE``)."""
    hub = constants.ENDPOINT
    if hub in _answers or is_offline_mode():
        return None
    known = _silent.get(hub)
    if known is None or time.monotonic() - known[0] > MEMORY:
        error = _ask(hub)
        if error is None:
            _answers.add(hub)
            return None
        told = " ".join(str(error).split()) or type(error).__name__
        known = _silent[hub] = time.monotonic(), f"the hub ({hub}) could not be reached ({told})"
    return known[1]


@contextmanager
def within_reach(name: str) -> Generator[None]:
    """Around reading a model: without the hub, from what was fetched before, which is said, or not at all.

    Args:
        name: folder or hub name.

    Raises:
        RemoteError: the model is not on this machine, and the hub cannot be reached.
    """
    reason = why_unreachable() if _is_of_hub(name) else None
    if reason is None:
        yield
        return
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise RemoteError(
            f"model {name!r} is no folder here and was not fetched before, and {reason}; give the path of a folder, or "
            "look at the network, a proxy (HTTPS_PROXY) and HF_ENDPOINT"
        )
    warnings.warn(f"{reason}; what was fetched of {name!r} before is used", stacklevel=4)
    constants.HF_HUB_OFFLINE = True  # else every file that the model does not have is asked for, in 46 seconds
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _is_of_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _ask(hub: str) -> Exception | None:
    """Why it did not answer."""
    begun = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            cast(Any, get_session()).head(hub, timeout=PATIENCE, follow_redirects=False)
        except (OSError, _CLIENT_ERROR) as error:
            if attempt == ATTEMPTS or time.monotonic() - begun > PATIENCE / 2:
                return error
            time.sleep(PAUSE)
        else:
            break
    return None
