"""COEFFICIENTS → FILE: a fine-tune is a seed, a method and a few thousand numbers; the file holds nothing else.

A packed file is a safetensors file with one flat tensor of coefficients and one metadata record, the spec. It knows
specs and named tensors and no layer: :mod:`randbasis.adapters.packed` is the bridge to PEFT directories and models. The
format, byte by byte, is docs/adapter-file.md.
"""

from typing import TYPE_CHECKING

from randbasis.lazy import lazy_names

if TYPE_CHECKING:
    from randbasis.adapter_file.adapter import PackedAdapter, read
    from randbasis.adapter_file.contents import Contents, Verification, verify
    from randbasis.adapter_file.spec import Base, MatrixGroup, Spec, SpecMatrix, fingerprint, group_matrices
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "randbasis.adapter_file.adapter": "PackedAdapter read",
            "randbasis.adapter_file.contents": "Contents Verification verify",
            "randbasis.adapter_file.spec": "Base MatrixGroup Spec SpecMatrix fingerprint group_matrices",
        },
    )

__all__ = [
    "Base",
    "Contents",
    "MatrixGroup",
    "PackedAdapter",
    "Spec",
    "SpecMatrix",
    "Verification",
    "fingerprint",
    "group_matrices",
    "read",
    "verify",
]
