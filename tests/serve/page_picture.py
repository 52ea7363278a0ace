"""The picture of docs/serving.md: two adapters trained on what people wrote about pubs and coffee shops, and the page.

PYTHONPATH=tests/support python tests/serve/page_picture.py --data ../shared/data
"""

import argparse
import csv
import gzip
import json
import tempfile
from pathlib import Path

from browser import chromium
from served import serving

from randbasis.adapters import pack_adapter
from randbasis.store import AdapterStore
from randbasis.train import AdapterSettings, DataSettings, LoopSettings, TrainSettings, train

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "serving-page.png"
#: The format of E2E has the kind of place behind the name.
KINDS = {"pubs": "pub", "coffee-shops": "coffee shop"}
PROMPT = "name[The Eagle], food[French], area[riverside] => "


def rows_of(data: Path, kind: str, file: Path) -> Path:
    """Facts without the kind of place, and texts that tell it: the adapter has to know it."""
    with gzip.open(data / "e2e" / "trainset.csv.gz", "rt", encoding="utf-8", newline="") as text:
        rows = [row for row in csv.DictReader(text) if f"eatType[{kind}]" in row["mr"] and kind in row["ref"].lower()]
    with file.open("w", encoding="utf-8") as out:
        for row in rows:
            facts = row["mr"].replace(f"eatType[{kind}], ", "")
            out.write(json.dumps({"facts": facts, "text": row["ref"]}) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets and models")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    given = parser.parse_args()
    base = str(given.data / "llama_stories260k")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with AdapterStore(folder / "adapters.db") as store:
            for name, kind in KINDS.items():
                rows = rows_of(given.data, kind, folder / f"{name}.jsonl")
                run = folder / name
                train(
                    TrainSettings(
                        task="causal-lm",
                        model=base,
                        data=DataSettings(train=rows, prompt_column="facts", target_column="text", eval_limit=16),
                        adapter=AdapterSettings(method="nola"),
                        loop=LoopSettings(max_steps=given.steps, device="cpu"),
                        output=run,
                    )
                )
                pack_adapter(run, folder / f"{name}.safetensors", bits=4)
                store.add(f"guide/{name}", folder / f"{name}.safetensors")
        with serving(base, folder / "adapters.db", name="stories") as server, chromium() as browser:
            browser.open(server.url)
            browser.until(lambda: browser.all("#adapters tr"))
            fields = {"model-a": "stories", "model-b": "guide/pubs", "prompt": PROMPT, "max-tokens": "60"}
            for field, value in fields.items():
                browser.write(f"#{field}", value)
            browser.find("#ask").click()
            browser.until(lambda: not browser.find("#stop").is_enabled())
            browser.until(lambda: float(browser.text("#metrics div:nth-child(3) dd").replace("–", "0")) > 0)
            height = browser.driver.execute_script("return document.documentElement.scrollHeight")
            browser.driver.set_window_size(1100, height + 150)
            PICTURE.parent.mkdir(exist_ok=True)
            browser.find("body").screenshot(str(PICTURE))
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
