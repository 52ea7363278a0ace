"""How fast a key may ask."""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from randbasis.errors import KeysError

_RATE = re.compile(r"(?P<count>\d{1,9})/(?P<unit>s|min|h)")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Rate:
    """So many requests in so many seconds; all of them may come at once.

    Attributes:
        count: requests.
        seconds: in which.
        text: as it was written.
    """

    count: int
    seconds: float
    text: str

    @classmethod
    def parse(cls, text: str) -> "Rate":
        """``"10/s"``, ``"100/min"`` or ``"1000/h"``.

        Raises:
            KeysError: it is none of these.
        """
        found = _RATE.fullmatch(text)
        if found is None or int(found["count"]) < 1:
            raise KeysError(f"rate must be a number a unit of time, got {text!r}; write 10/s, 100/min or 1000/h")
        return cls(int(found["count"]), _SECONDS[found["unit"]], text)


class TokenBuckets:
    """A bucket a key: it fills at the key's rate, and a request takes one token out.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._levels: dict[tuple[str, Rate], tuple[float, float]] = {}

    def take(self, name: str, rate: Rate | None) -> float:
        """Take a token; 0 where there was one, else the seconds until there is.

        A key that gets another rate begins with a full bucket.
        """
        if rate is None:
            return 0.0
        with self._lock:
            now = self._clock()
            level, before = self._levels.get((name, rate), (float(rate.count), now))
            level = min(float(rate.count), level + (now - before) * rate.count / rate.seconds)
            if level >= 1:
                self._levels[name, rate] = level - 1, now
                return 0.0
            self._levels[name, rate] = level, now
            return (1 - level) * rate.seconds / rate.count
