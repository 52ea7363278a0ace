"""Run by llama_cpp_lora.py with an interpreter that has llama-cpp-python: logits of a base, with or without a LoRA.

Arguments: the base and the LoRA in GGUF ("-" for none), token numbers with commas, and the .npy file to write.
"""

import ctypes
import sys

import llama_cpp
import numpy as np

base, lora, words, output = sys.argv[1:]
tokens = [int(word) for word in words.split(",")]
silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
model = llama_cpp.llama_model_load_from_file(base.encode(), llama_cpp.llama_model_default_params())
options = llama_cpp.llama_context_default_params()
options.n_ctx = options.n_batch = 64
options.n_threads = options.n_threads_batch = 1
options.type_k = options.type_v = 0  # float32 keys and values
options.flash_attn_type = 0
context = llama_cpp.llama_init_from_model(model, options)
if lora != "-":
    adapter = llama_cpp.llama_adapter_lora_init(model, lora.encode())
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
batch.n_tokens = len(tokens)
for index, token in enumerate(tokens):
    batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
    batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
assert llama_cpp.llama_decode(context, batch) == 0
vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
rows = [llama_cpp.llama_get_logits_ith(context, index) for index in range(len(tokens))]
np.save(output, np.stack([np.ctypeslib.as_array(row, shape=(vocabulary,)).copy() for row in rows]))
