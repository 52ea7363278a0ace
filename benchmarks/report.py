"""Tables from the csv into pages, between markers, so that what stands there is what was measured.

``<!-- table: step -->`` and ``<!-- end of table -->`` stand each on a line of their own; everything between them is
replaced. The prose around them stays.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import soak_page, store_page
from benchmarks.rows import Run
from benchmarks.tables import tables

DOCS = Path(__file__).parents[1] / "docs"
PAGES = tuple(DOCS / name for name in ("performance.md", "kernels.md", "store.md", "adapter-file.md", "serving.md"))
PICTURES = DOCS / "performance"
END = "<!-- end of table -->"
_BLOCK = re.compile(rf"<!-- table: (?P<name>[^\n]+?) -->\n.*?^{re.escape(END)}$", re.DOTALL | re.MULTILINE)


def filled(page: str, runs: Sequence[Run]) -> str:
    """A page with its tables made anew.

    Args:
        page: text with markers.
        runs: the newest of each case.

    Raises:
        ValueError: a marker names no table, or is not closed.
    """
    made = {**tables(runs), "store": store_page.block, "soak": soak_page.block}
    if page.count("<!-- table: ") != len(_BLOCK.findall(page)) or page.count(END) != page.count("<!-- table: "):
        raise ValueError(f"every line '<!-- table: NAME -->' must be closed by a line {END!r}")

    def block(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in made:
            raise ValueError(f"a marker must name one of {', '.join(made)}, got {name!r}")
        return f"<!-- table: {name} -->\n\n{made[name]()}\n\n{END}"

    return _BLOCK.sub(block, page)
