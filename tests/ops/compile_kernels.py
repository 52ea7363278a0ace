"""Compile the Triton kernels for an H100 on a machine without one: ``TRITON_INTERPRET=0 python compile_kernels.py``.

The interpreter takes what a compiler refuses (a branch that returns another shape, an argument's name that is taken,
a number that becomes a constant because it is 1), so the kernels are compiled too: for the shapes of a 7B layer and for
the smallest, down to machine code. Prints one line a kernel: its name and the bytes of its code.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from randbasis.basis import Basis
from randbasis.ops import triton, triton_kernels
from randbasis.ops.reference import Slab, Tile

CPU = torch.device("cpu")


class H100:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kernel = triton_kernels.KERNELS[name]

    def __getitem__(self, grid: tuple[int, ...]):
        def compile_only(*arguments: object, **options: object) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            print(self.name, len(compiled.asm["cubin"]))

        return compile_only


def main() -> None:
    """Go through every kernel and every branch of it that does not depend on the others."""
    driver.set_active(H100())
    for name in list(triton_kernels.KERNELS):
        triton_kernels.KERNELS[name] = Compiled(name)
    layer = Slab(Basis.named(2**63 + 1, 0xECEB6DCF, "sign"), 128, 16, 4096)
    packed = torch.zeros(128, 16, 4 * layer.blocks, dtype=torch.int32)
    triton.words(layer, Tile(0, 128, 0, 16), CPU)
    triton.combine(torch.zeros(1, 128), layer)
    triton.inner(torch.zeros(16, 16, 4096), layer, packed)
    triton.project(torch.zeros(64, 4096, dtype=torch.bfloat16), layer)
    triton.combine_each(torch.zeros(3, 1, 128), layer, [0, 1, 2**32 - 1])
    for law in ("uniform", "normal", "sparse(6)"):
        triton.expand(Slab(Basis.named(0, 0, law), 2, 3, 96), Tile(0, 2, 0, 3), torch.bfloat16, CPU)
    hashed = Slab(Basis.named(0, 0, "hashed"), 1000, 16, 4096)
    triton.combine(torch.zeros(1, 1000), hashed)
    triton.combine_each(torch.zeros(3, 16, 1000, dtype=torch.bfloat16), hashed, [0, 1, 2**32 - 1])
    triton.inner(torch.zeros(16, 16, 4096, dtype=torch.float16), hashed, triton.words(hashed, hashed.drawn, CPU))
    triton.inner_each(torch.zeros(3, 16, 16, 4096), hashed, [0, 1, 2**32 - 1])
    smallest = Slab(Basis.named(1, 1, "sign"), 1, 1, 1)
    triton.words(smallest, Tile(0, 1, 0, 1), CPU)
    triton.combine(torch.zeros(1, 1), smallest)
    triton.inner(torch.zeros(1, 1, 1, dtype=torch.float16), smallest)
    smallest = Slab(Basis.named(1, 1, "hashed"), 1, 1, 1)
    triton.combine(torch.zeros(1, 1), smallest)
    triton.inner(torch.zeros(1, 1, 1, dtype=torch.float16), smallest)


if __name__ == "__main__":
    main()
