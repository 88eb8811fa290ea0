"""Kernels of a user's own: one that works, and one that no assembler takes."""

import torch
import triton
import triton.language as tl
from planted import Small


@triton.jit
def doubled(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count)
    tl.store(out_ptr + at, x + x, mask=at < count)


@triton.jit
def unknown_instruction(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count).to(tl.float32)
    y = tl.inline_asm_elementwise(
        "no_such.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(out_ptr + at, y, mask=at < count)


class LaunchesKernel(Small):
    kernel = doubled

    def changed(self, x_BLD):
        out_BLD, count = torch.empty_like(x_BLD), x_BLD.numel()
        self.kernel[(triton.cdiv(count, 128),)](x_BLD, out_BLD, count, BLOCK=128)
        return out_BLD + x_BLD


class LaunchesBadKernel(LaunchesKernel):
    kernel = unknown_instruction
