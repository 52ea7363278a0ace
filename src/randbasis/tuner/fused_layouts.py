"""Where query, key and value, or gate and up, lie in the fused projections of the models of transformers.

Nothing in a weight tells its parts, and each model splits its projections in its own way: by thirds, by the numbers of
heads, head by head, or as CodeGen does. So a name is taken only where the split was read in the model's own code, and
:data:`LAYOUTS` is what was read.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from transformers import PreTrainedConfig

Sizes = dict[str, int]
"""Rows of each part, in the order of the rows."""

Layout = Callable[[Mapping[str, Any], int], Sizes | None]
"""From a model's configuration and the rows of the layer to the parts; None where they are not ranges of rows."""


def _thirds(_: Mapping[str, Any], rows: int) -> Sizes | None:
    return {"q": rows // 3, "k": rows // 3, "v": rows // 3} if rows % 3 == 0 else None


def _blocks_of(width: str) -> Layout:
    """Thirds; a layer of two widths holds the keys and values of cross-attention, whose queries have their own."""

    def layout(config: Mapping[str, Any], rows: int) -> Sizes | None:
        if rows == 2 * int(config.get(width) or 0):
            return {"k": rows // 2, "v": rows // 2}
        return _thirds(config, rows)

    return layout


def _grouped(heads: int | None, groups: int | None, rows: int) -> Sizes | None:
    if not heads or not groups or rows % (heads + 2 * groups):
        return None
    size = rows // (heads + 2 * groups)
    return {"q": heads * size, "k": groups * size, "v": groups * size}


def _by_heads(config: Mapping[str, Any], rows: int) -> Sizes | None:
    heads = config.get("num_attention_heads")
    return _grouped(heads, config.get("num_key_value_heads") or heads, rows)


def _dbrx(config: Mapping[str, Any], rows: int) -> Sizes | None:
    attention = cast("Mapping[str, Any]", config.get("attn_config") or {})
    return _grouped(config.get("n_heads"), attention.get("kv_n_heads"), rows)


def _bigcode(config: Mapping[str, Any], rows: int) -> Sizes | None:
    return _grouped(config.get("n_head"), 1, rows) if config.get("multi_query", True) else None


def _falcon(config: Mapping[str, Any], rows: int) -> Sizes | None:
    one_key = config.get("multi_query", True) and not config.get("new_decoder_architecture")
    return _grouped(config.get("num_attention_heads"), 1, rows) if one_key else None


def _gate_up(_: Mapping[str, Any], rows: int) -> Sizes | None:
    return {"gate": rows // 2, "up": rows // 2} if rows % 2 == 0 else None


def _by_head(_: Mapping[str, Any], rows: int) -> None:
    """Query, key and value alternate from head to head."""


_VISION_QKV = (
    "blip_vision_model", "blip_2_vision_model", "cohere_compass_vision", "deepseek_ocr2_sam_vision_model",
    "dots3_note_vision_encoder", "ernie4_5_vl_moe_vision", "florence_vision", "glm4v_vision", "glm4v_moe_vision",
    "glm5_next_vision", "glm_image_vision", "glm_ocr_vision", "got_ocr2_vision", "hiera", "instructblip_vision_model",
    "instructblipvideo_vision_model", "mgp-str", "pp_formulanet_vision", "qwen2_vl_vision", "qwen2_5_vl_vision",
    "qwen3_5_vision",
    "qwen3_5_moe_vision", "qwen3_omni_moe_vision_encoder", "qwen3_vl_vision", "qwen3_vl_moe_vision",
    "sam2_hiera_det_model", "sam_hq_vision_model", "sam_vision_model", "seggpt", "slanext_vision", "timesformer",
    "unlimited_ocr_sam_vision_model", "vitdet",
)  # fmt: skip
_GATE_UP_MLP = ("dia_encoder", "dia_decoder", "glm", "glm4", "glm4v_text", "glm_image_text", "glm_ocr_text", "phi3")

LAYOUTS: dict[tuple[str, str], Layout] = {
    ("gpt2", "c_attn"): _blocks_of("n_embd"),
    ("imagegpt", "c_attn"): _blocks_of("n_embd"),
    ("decision_transformer", "c_attn"): _blocks_of("hidden_size"),
    ("openai-gpt", "c_attn"): _thirds,
    ("semantic", "att_proj"): _thirds,
    ("coarse_acoustics", "att_proj"): _thirds,
    ("fine_acoustics", "att_proj"): _thirds,
    ("gpt_bigcode", "c_attn"): _bigcode,
    ("phi3", "qkv_proj"): _by_heads,
    ("phi4_multimodal", "qkv_proj"): _by_heads,
    ("phi4_multimodal", "mlp.gate_up_proj"): _gate_up,
    ("dbrx", "Wqkv"): _dbrx,
    ("mpt", "Wqkv"): _thirds,
    ("modernbert", "Wqkv"): _thirds,
    ("falcon", "query_key_value"): _falcon,
    **{(model, "qkv"): _thirds for model in _VISION_QKV},
    # The vision part has the type of the whole in early versions 5 of transformers; the language part has no qkv.
    **{(model, "attn.qkv"): _thirds for model in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")},
    **{(model, "mlp.gate_up_proj"): _gate_up for model in _GATE_UP_MLP},
    **{(model, "query_key_value"): _by_head for model in ("bloom", "gpt_neox", "gpt_neox_japanese", "persimmon")},
    ("codegen", "qkv_proj"): _by_head,
    ("minimax", "qkv_proj"): _by_head,
}
"""``(model_type, end of the module path)`` → its layout; of a composite model, the type of the part that it lies in."""


def known_layout(key: str, rows: int, config: Mapping[str, Any]) -> tuple[str, Sizes | None] | None:
    """The layout of a module, and the model type that it is of.

    Args:
        key: module path.
        rows: output rows of the module.
        config: the model's configuration as a mapping, those of its parts inside.

    Returns:
        The model type, and the rows of each part or None where the parts alternate; None for a module that is in no
        row of :data:`LAYOUTS`, or in rows that do not agree.
    """
    found = [
        (str(part["model_type"]), layout(part, rows))
        for part in _configurations(config)
        for (model_type, end), layout in LAYOUTS.items()
        if part["model_type"] == model_type and f".{key}".endswith(f".{end}")
    ]
    agree = all(sizes == found[0][1] for _, sizes in found)
    return found[0] if found and agree else None


def _configurations(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configuration and those of the parts of a composite model, as far as they say their type."""
    if config.get("model_type"):
        yield config
    for value in config.values():
        if isinstance(value, PreTrainedConfig):
            value = value.to_dict()
        if isinstance(value, Mapping):
            yield from _configurations(cast("Mapping[str, Any]", value))
