"""The page: two answers side by side, in a real browser; and what can be said of its files without one."""

import socket
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Browser, chromium
from served import Served, serving

from randbasis.serve.keys import add_key
from randbasis.serve.page_routes import PAGE_FILES

CONTROLS = {"input", "textarea", "select", "button"}
#: Where the tabulator goes, from the top.
ORDER = (
    "key", "use-key", "prompt", "model-a", "model-b", "max-tokens", "temperature", "ask", "text", "text", "live",
    "filter", "reload",
)  # fmt: skip


class Elements(HTMLParser):
    """Tags with their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def keyed(base: str, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, str]]:
    """A server that wants a key, and the key of one tenant."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    _, secret = add_key(file, "acme", ["acme/*"], None, "read")
    with serving(base, store, keys=str(file)) as found:
        yield found, secret


class TestFiles:
    def test_they_need_no_key_and_allow_nothing_from_elsewhere(self, keyed: tuple[Served, str]):
        for path in PAGE_FILES:
            answer = httpx.get(keyed[0].url + path)
            assert answer.status_code == 200
            rules = dict(rule.split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split("; "))
            assert rules["default-src"] == "'none'"
            assert {rules[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
            assert "http" not in answer.text.replace("http-equiv", "")
        assert httpx.get(f"{keyed[0].url}/v1/models").status_code == 401

    def test_all_that_the_page_asks_for_is_served(self, served: Served):
        elements = Elements(httpx.get(served.url).text).found
        named = {a.get("src") or a.get("href") for tag, a in elements if tag in ("script", "link")} - {"data:,"}
        assert named == set(PAGE_FILES) - {"/"}

    def test_each_control_has_a_label(self, served: Served):
        elements = Elements(httpx.get(served.url).text).found
        labels = {a["for"] for tag, a in elements if tag == "label"}
        fields = {a["id"] for tag, a in elements if tag in CONTROLS - {"button"}}
        assert labels == fields
        assert len(fields) == 8

    def test_the_schema_of_the_api_does_not_have_them(self, served: Served):
        assert not set(httpx.get(f"{served.url}/openapi.json").json()["paths"]) & set(PAGE_FILES)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def ask(browser: Browser, first: str, second: str, prompt: str) -> tuple[str, str]:
    """Both answers, once they are there; words of the server where there is none."""
    for field, value in (("model-a", first), ("model-b", second), ("prompt", prompt), ("max-tokens", "24")):
        browser.write(f"#{field}", value)
    browser.find("#ask").click()
    browser.until(lambda: not browser.find("#stop").is_enabled())
    return browser.text("#answer-a .text"), browser.text("#answer-b .text")


def completed(served: Served, model: str, prompt: str, key: str = "none") -> str:
    """The same without the page."""
    client: Any = served.openai(key)
    return client.completions.create(model=model, prompt=prompt, max_tokens=24, temperature=0).choices[0].text


PROMPT = "Once upon a time there was a little"


class TestBrowser:
    def test_both_answers_are_those_of_the_api(self, browser: Browser, served: Served, base: str):
        browser.open(served.url)
        browser.until(lambda: browser.all("#adapters tr"))
        answers = ask(browser, Path(base).name, "acme/a", PROMPT)
        assert answers == tuple(completed(served, model, PROMPT) for model in (Path(base).name, "acme/a"))
        assert len(set(answers)) == 2
        assert all(answers)
        for side, model in (("a", Path(base).name), ("b", "acme/a")):
            assert browser.text(f"#title-{side}") == f"Answer {side.upper()}: {model}"
            figures = browser.text(f"#answer-{side} .figures")
            assert "first token after" in figures
            assert "tokens/s · 24 tokens · length" in figures
        assert not browser.driver.get_log("browser")  # no error of the script, nothing refused by the policy

    def test_nothing_leaves_the_origin(self, browser: Browser, served: Served):
        browser.fetched()
        browser.open(served.url)
        browser.until(lambda: browser.all("#metrics dd"))
        ask(browser, "acme/a", "acme/b", PROMPT)
        asked = {url.removeprefix(served.url) for url in browser.fetched() if not url.startswith("data:")}
        assert asked == {*PAGE_FILES, "/v1/models", "/v1/completions", "/metrics"}

    def test_a_script_could_not_send_the_key_elsewhere(self, browser: Browser, served: Served):
        browser.open(served.url)
        with socket.create_server(("127.0.0.1", 0)) as elsewhere:
            elsewhere.settimeout(0.5)
            address = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/"
            fetch = (
                "const done = arguments[1]; fetch(arguments[0], {mode: 'no-cors'}).then(() => done(1), () => done(0))"
            )
            assert browser.driver.execute_async_script(fetch, address) == 0
            with pytest.raises(TimeoutError):
                elsewhere.accept()
        assert any("Content Security Policy" in one["message"] for one in browser.driver.get_log("browser"))

    def test_answers_come_in_pieces(self, browser: Browser, served: Served):
        browser.open(served.url)
        watch = """window.lengths = []; const text = document.querySelector('#answer-b .text');
            new MutationObserver(() => lengths.push(text.textContent.length)).observe(text, {childList: true});"""
        browser.driver.execute_script(watch)
        ask(browser, "acme/a", "acme/b", PROMPT)
        lengths = browser.driver.execute_script("return lengths")
        assert lengths == sorted(lengths)
        assert len(set(lengths)) > 5

    def test_the_tabulator_reaches_all_in_reading_order(self, browser: Browser, served: Served):
        from selenium.webdriver import ActionChains, Keys

        browser.open(served.url)
        browser.until(lambda: browser.all("#adapters tr"))
        reached: list[str] = []
        for _ in range(len(ORDER) + 2):
            ActionChains(browser.driver).send_keys(Keys.TAB).perform()
            here = browser.driver.switch_to.active_element
            assert here.accessible_name
            reached.append(here.get_attribute("id") or here.get_attribute("class") or here.accessible_name)
        assert reached[: len(ORDER)] == [*ORDER]
        base, *_ = browser.texts("#adapters td:first-child")
        # a list that scrolls may be reached itself, before its buttons
        assert reached[len(ORDER) :][-1] in (f"Take {base} as A", f"Take {base} as B")
        here.send_keys(Keys.ENTER)
        assert base in {browser.find(f"#model-{side}").get_property("value") for side in "ab"}

    def test_asking_needs_no_mouse(self, browser: Browser, served: Served):
        from selenium.webdriver import Keys

        browser.open(served.url)
        browser.until(lambda: browser.find("#model-b").get_property("value"))
        browser.find("#model-b").send_keys(Keys.ENTER)
        browser.until(lambda: "tokens/s" in browser.text("#answer-b .figures"))

    def test_stop_ends_both_and_the_server_goes_on_with_neither(self, browser: Browser, served: Served):
        def running() -> bool:
            return "randbasis_requests_running 0.0" not in httpx.get(f"{served.url}/metrics").text

        browser.open(served.url)
        browser.until(lambda: browser.find("#model-b").get_property("value"))
        browser.write("#max-tokens", "400")
        browser.find("#ask").click()
        browser.until(lambda: browser.text("#answer-a .text") and browser.text("#answer-b .text"))
        assert running()
        browser.find("#stop").click()
        browser.until(lambda: not browser.find("#stop").is_enabled())
        assert "stopped here" in browser.text("#answer-a .figures")
        assert browser.text("#answer-a .trouble") == ""
        browser.until(lambda: not running())
        cancelled = httpx.get(f"{served.url}/metrics").text.partition('answers_total{finish="cancelled"} ')[2]
        assert float(cancelled.split()[0]) >= 2

    def test_the_list_is_that_of_the_api_and_can_be_filtered(self, browser: Browser, served: Served):
        browser.open(served.url)
        browser.until(lambda: browser.all("#adapters tr"))
        cells = browser.texts("tbody td")  # five of text, one of buttons
        rows = [cells[at : at + 5] for at in range(0, len(cells), 6)]
        cards = httpx.get(f"{served.url}/v1/models").json()["data"]
        assert rows == [
            [
                one["id"],
                one["method"] or "base",
                "–" if one["version"] is None else str(one["version"]),
                "–" if one["bytes"] is None else f"{one['bytes']:,}",
                "yes" if one["resident"] else "no",
            ]
            for one in cards
        ]
        browser.write("#filter", "OTHER/")
        names = browser.texts("#adapters td:first-child")
        assert names == ["other/a", "other/b", "other/c"]
        assert browser.text("#shown") == f"3 of 3 shown, {len(cards)} in all"

    def test_metrics_move(self, browser: Browser, served: Served):
        browser.open(served.url)
        browser.until(lambda: browser.all("#metrics dd"))
        watch = """window.rates = []; const metrics = document.querySelector('#metrics');
            new MutationObserver(() => rates.push(metrics.querySelector('div:nth-child(3) dd').textContent))
                .observe(metrics, {childList: true});"""
        browser.driver.execute_script(watch)
        ask(browser, "acme/a", "acme/b", PROMPT)
        assert set(browser.texts("dt")) == {
            "Waiting", "Running", "Tokens/s", "In memory", "Hits", "Misses", "Resident bytes",
        }  # fmt: skip
        rates = "return rates.filter((one) => Number(one) > 0)"  # all that were shown: each stands for a moment
        browser.until(lambda: browser.driver.execute_script(rates))
        browser.until(lambda: browser.text("#metrics div:nth-child(5) dd").replace(",", "") != "0")


class TestKeys:
    def test_the_page_shows_what_the_key_may_use_and_keeps_it_nowhere(
        self, browser: Browser, keyed: tuple[Served, str]
    ):
        server, secret = keyed
        browser.open(server.url)
        browser.until(lambda: "Authorization" in browser.text("#trouble"))
        assert not browser.all("#adapters tr")
        browser.write("#key", secret)
        browser.find("#use-key").click()
        browser.until(lambda: browser.all("#adapters tr"))
        assert browser.texts("#adapters td:first-child") == ["acme/a", "acme/b", "acme/c"]
        assert browser.text("#trouble") == ""
        answers = ask(browser, "acme/a", "acme/b", PROMPT)
        assert answers == tuple(completed(server, model, PROMPT, secret) for model in ("acme/a", "acme/b"))
        kept = "return [JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie, location.href]"
        assert browser.driver.execute_script(kept) == ["{}", "{}", "", f"{server.url}/"]
        assert not [url for url in browser.fetched() if secret in url]
        browser.driver.refresh()
        assert browser.find("#key").get_property("value") == ""

    def test_an_error_is_shown_as_the_server_says_it(self, browser: Browser, keyed: tuple[Served, str]):
        server, secret = keyed
        browser.open(server.url)
        browser.write("#key", secret)
        browser.find("#use-key").click()
        browser.until(lambda: browser.all("#adapters tr"))
        _, good = ask(browser, "other/a", "acme/b", PROMPT)
        asked = {"model": "other/a", "prompt": PROMPT}
        said = httpx.post(f"{server.url}/v1/completions", json=asked, headers={"Authorization": f"Bearer {secret}"})
        assert browser.text("#answer-a .trouble") == said.json()["error"]["message"]
        assert "other/a" in said.json()["error"]["message"]
        assert good  # the other answer comes all the same
        assert browser.find("#answer-a .trouble").get_attribute("role") == "alert"
