"""ADAPTER → OTHER FORMATS: what runs without this package.

A LoRA directory of plain PEFT, a model with the adapter merged into its weights, and a LoRA adapter of llama.cpp. The
source is an adapter directory or a packed file; the base model's weights are read for merging alone.
"""

from randbasis.export.gguf_lora import export_gguf_lora
from randbasis.export.merged import export_merged
from randbasis.export.peft_lora import LoraExport, export_peft_lora

__all__ = ["LoraExport", "export_gguf_lora", "export_merged", "export_peft_lora"]
