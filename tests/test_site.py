"""The site: built strictly as `make docs` builds it, with every public name, and nothing that comes from elsewhere."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser, chromium
from new_user import commands

import randbasis

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
#: What a browser fetches by itself, by tag and attribute.
FETCHED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data")}
FENCES = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Addresses(HTMLParser):
    """What a page fetches, and the anchors that it has."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.add(found.get("id") or "")
        self.fetched += [found[name] or "" for name in ("src", "data") if (tag, name) in FETCHED and name in found]
        if tag == "link" and found.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.fetched.append(found.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the site needs mkdocs-material")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the reference needs mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
    assert config.strict
    config.plugins.on_startup(command="build", dirty=False)
    build(config)  # a warning of any of its validations ends it
    config.plugins.on_shutdown()
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Addresses]:
    files = sorted(site.rglob("*.html"))
    return {str(file.relative_to(site)): Addresses(file.read_text(encoding="utf-8")) for file in files}


def test_every_page_is_there(pages: dict[str, Addresses]):
    written = {str(page.relative_to(DOCS).with_suffix(".html")) for page in DOCS.rglob("*.md")}
    assert written <= pages.keys()


def test_every_public_name_is_in_the_reference(pages: dict[str, Addresses]):
    there = set[str]().union(*(page.anchors for name, page in pages.items() if name.startswith("reference/")))
    assert not [name for name in randbasis.__all__ if f"randbasis.{name}" not in there]
    listed = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\[randbasis\.(\w+)\]", listed)) == set(randbasis.__all__)


def test_every_error_is_in_the_reference(pages: dict[str, Addresses]):
    own = [value for value in vars(randbasis.errors).values() if isinstance(value, type)]
    names = {one.__name__ for one in own if issubclass(one, randbasis.RandbasisError)} - {"RandbasisError"}
    assert {f"randbasis.errors.{name}" for name in names} <= pages["reference/errors.html"].anchors


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[str, Addresses]):
    for name, page in pages.items():
        assert page.fetched
        assert not [one for one in page.fetched if re.match(r"(https?:)?//", one)], name
    styles = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.css"))
    assert not re.findall(r"url\([\"']?(?:https?:)?//[^)]*|@import[^;]*", styles)


def test_docstrings_leave_no_roles(site: Path):
    text = "".join(file.read_text(encoding="utf-8") for file in (site / "reference").glob("*.html"))
    assert not re.findall(r":(?:class|meth|attr|func|mod|data):", text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize("page", ["index.html", "results.html", "reference/model.html"])
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_it_without_a_network(browser: Browser, site: Path, page: str, width: int):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.open((site / page).as_uri())
    browser.until(lambda: browser.driver.execute_script("return document.readyState") == "complete")
    addresses = browser.fetched()
    assert addresses
    assert all(one.startswith((site.as_uri(), "data:")) for one in addresses)
    # What is wider than the window scrolls by itself, not the page with it.
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
    broken = "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
    assert browser.driver.execute_script(broken) == []


def test_the_search_finds_a_page_from_the_disk(browser: Browser, site: Path):
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.open((site / "index.html").as_uri())
    browser.find("input.md-search__input").send_keys("stochastic")
    found = "return [...document.querySelectorAll('.md-search-result__link')].map((one) => one.href)"
    browser.until(lambda: any("rounding.html" in one for one in browser.driver.execute_script(found)))


def test_light_and_dark(browser: Browser, site: Path):
    browser.open((site / "index.html").as_uri())
    seen = set[str]()
    for _ in range(3):
        seen.add(browser.driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
        browser.find("form[data-md-component=palette] label:not([hidden])").click()
    assert len(seen) == 2


# --- what pages of prose say ---


@pytest.mark.parametrize("page", ["index.md", "start.md"])
def test_its_commands_are_those_of_the_readme(page: str):
    """Which tests/test_readme.py runs."""
    known = commands()
    found: list[str] = []
    for language, body in FENCES.findall((DOCS / page).read_text(encoding="utf-8")):
        if language == "python":
            found.append(f"python - <<'END'\n{body}END")
        else:
            found += [one.removeprefix("$ ").rstrip() for one in re.split(r"\n(?=\$ )", body)]
    assert len(found) >= 2
    assert found == [one for one in known if one in found]


def test_scores_of_the_page_that_chooses_are_those_of_measured_pages():
    measured = "".join(
        file.read_text(encoding="utf-8")
        for file in (DOCS / "results.md", DOCS / "defaults.md", *DOCS.glob("results/**/*.md"))
    )
    quoted = re.findall(r"\d+\.\d+ ± \d+\.\d+", (DOCS / "choose.md").read_text(encoding="utf-8"))
    assert len(quoted) > 10
    assert not [one for one in quoted if one not in measured]
