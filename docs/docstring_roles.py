"""Names that docstrings cite as Sphinx would (``:class:`~randbasis.laws.Law` ``), for pages that Markdown is made to.

Such a name becomes code, and a link where the reference describes what it names.
"""

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|meth|attr|func|mod|data):`(?P<short>~?)(?P<name>[\w.]+)`")


def _linked(cited: re.Match[str]) -> str:
    name = cited["name"]
    shown = name.rpartition(".")[2] if cited["short"] else name
    return f'<autoref optional identifier="{name}"><code>{shown}</code></autoref>'


class Roles(Extension):
    """Rewrites each docstring once it is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_linked, obj.docstring.value)
