"""What somebody without randbasis does with an export: PEFT and transformers alone, on the rows that were answered.

Arguments: task, base, exported folder, answers of randbasis (JSON lines). Prints how many rows there are, how many
were answered alike, and how far probabilities or numbers are apart.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

sys.modules["randbasis"] = None  # type: ignore[assignment]


def main() -> None:
    task, base, export, answers = sys.argv[1:]
    rows = [json.loads(line) for line in Path(answers).read_text(encoding="utf-8").splitlines()]
    columns = json.loads((Path(export) / "task.json").read_text(encoding="utf-8"))["task"].get("columns", {})
    with torch.no_grad():
        found = {"text": of_texts, "images": of_images, "embedding": of_vectors, "chat": of_chat}[task](
            base, export, rows, columns
        )
    same = sum(prediction == row["prediction"] or isinstance(prediction, float) for (prediction, _), row in found)
    apart = max(abs(number - row.get("probability", row["prediction"])) if number is not None else 0.0
                for (_, number), row in found)  # fmt: skip
    assert not any(name.startswith("randbasis.") for name in sys.modules)
    print(json.dumps({"rows": len(found), "same": same, "apart": apart}))


Rows = list[dict[str, Any]]
Found = list[tuple[tuple[Any, float | None], dict[str, Any]]]


def adapted(auto: Any, base: str, export: str, **options: Any) -> Any:
    model = PeftModel.from_pretrained(auto.from_pretrained(base, dtype=torch.float32, **options), export).eval()
    assert isinstance(model.peft_config["default"], LoraConfig)
    return model


def with_classes(auto: Any, base: str, export: str) -> Any:
    config = AutoConfig.from_pretrained(f"{export}/base-config")
    return adapted(auto, base, export, config=config, ignore_mismatched_sizes=True)


def chosen(logits: torch.Tensor, config: Any) -> tuple[Any, float]:
    if config.num_labels == 1:
        return logits.item(), logits.item()
    share = logits.softmax(-1)[0]
    best = int(share.argmax())
    return config.id2label[best], share[best].item()


def of_texts(base: str, export: str, rows: Rows, columns: dict[str, str | None]) -> Found:
    model, words = with_classes(AutoModelForSequenceClassification, base, export), AutoTokenizer.from_pretrained(base)
    names = [name for name in (columns["text"], columns["text_pair"]) if name]
    return [
        (chosen(model(**words(*(row[name] for name in names), return_tensors="pt")).logits, model.config), row)
        for row in rows
    ]


def of_images(base: str, export: str, rows: Rows, _: dict[str, str | None]) -> Found:
    from PIL import Image

    model, pixels = (
        with_classes(AutoModelForImageClassification, base, export),
        AutoImageProcessor.from_pretrained(base),
    )
    return [
        (
            chosen(model(**pixels(Image.open(row["image"]).convert("RGB"), return_tensors="pt")).logits, model.config),
            row,
        )
        for row in rows
    ]


def of_vectors(base: str, export: str, rows: Rows, columns: dict[str, str | None]) -> Found:
    model, words = adapted(AutoModel, base, export), AutoTokenizer.from_pretrained(base)

    def vector(text: str) -> torch.Tensor:
        return model(**words(text, return_tensors="pt")).last_hidden_state.mean(1)

    pairs = [(vector(row[columns["text"]]), vector(row[columns["text_pair"]])) for row in rows]
    cosines = [torch.cosine_similarity(one, other).item() for one, other in pairs]
    return [((cosine, cosine), row) for cosine, row in zip(cosines, rows, strict=True)]


def of_chat(base: str, export: str, rows: Rows, _: dict[str, str | None]) -> Found:
    model, words = adapted(AutoModelForCausalLM, base, export), AutoTokenizer.from_pretrained(base)
    told = json.loads((Path(export) / "task.json").read_text(encoding="utf-8"))["task"]
    words.chat_template = told["chat_template"]
    found: Found = []
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        given = words.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = model.generate(**given, max_new_tokens=40, do_sample=False, pad_token_id=0)
        text = words.decode(written[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(((text.strip(), None), row | {"prediction": row["text"].strip()}))
    return found


if __name__ == "__main__":
    main()
