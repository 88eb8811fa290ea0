"""Kernels that give the same bits each time, or the fastest ones: `train.deterministic`.

Invariant: where exactness.holds (config/hardware.py), every kernel of torch that trains adds in an
order that doesn't depend on the timing of threads, or raises an error that names it. Kernels that
others wrote (a class of the user's own) are not seen.

What torch 2.13 does on CUDA (docstring of torch.use_deterministic_algorithms, unless another file
is named; read, and not run: no GPU was there):

| operation of ours | by default | raising form | warn_only form |
|---|---|---|---|
| attention, flash: backward | atomic additions | one order | atomic additions, a warning |
| attention, memory-efficient: backward | keys are split | one split | split, a warning |
| attention, cuDNN: backward | not deterministic | not chosen | chosen, a warning |
| attention, FA3 and FA4 (train.attention_kernel): backward | atomics | one order | one order |
| attention, math; flash: forward | one order | the same | the same |
| flex_attention, Triton | no atomics but for gradients of a score's tables, which ours lack |||
| flex_attention, BACKEND=FLASH (not ours) | atomics | one order or an error | a warning |
| index_select, gather (experts), indexing: backward | atomics | sorted | sorted |
| scatter_add (loss, experts) | atomics | sorted | sorted |
| embedding: backward | sorted, one order | the same | the same |
| embedding: backward, compiled | atomics | as uncompiled | as uncompiled |
| cumsum of fractions (mixers/delta_rule.py has its own) | any order | an error | a warning |
| cumsum and bincount of integers | exact | the same | the same |
| torch._grouped_mm (experts), matrix products | one order; cuBLAS given a fixed workspace |||
| LSTM of cuDNN | one order, given a fixed workspace (docstring of torch.nn.LSTM) |||

Sources of the rows on attention: ATen/native/transformers/cuda/attention_backward.cu and
sdp_utils.cpp (check_cudnn_deterministic; check_prefer_cudnn_attention: where cuDNN may be chosen,
Hopper and Blackwell prefer it), torch/_inductor/kernel/flex/flex_flash_attention.py,
torch/nn/attention/_fa3.py and _fa4.py; of embedding: ATen/native/cuda/Embedding.cu. So warn_only,
which asks for the same promise, doesn't keep it for attention. The deterministic flash backward is
"slightly slower and uses more memory" (flash_attn_interface.py of flash-attention).

Doubt: NCCL adds in the order of its algorithm, which it chooses by message size and topology; on
other nodes it may be another. That torch._grouped_mm adds in one order is read from its kind
(CUTLASS, no split of the sum), not from a promise.
"""

import os
import re

import torch
from torch.nn.attention import SDPBackend, activate_flash_attention_impl

from forescale.config.hardware import exactness
from forescale.ground.errors import UserError

_REFUSED = re.compile(r"(\S+) does not have a deterministic implementation")


def mode_of(deterministic: bool, on_gpu: bool) -> str:
    """Return the mode for torch.set_deterministic_debug_mode: "error" is the raising form.

    A CPU needs it too: otherwise the gradient of an embedding is compiled to atomic additions, and
    after a few dozen steps two equal runs differ in the last bits. There it costs nothing, so
    `deterministic=false` only makes an error of a class of the user's own a warning.
    """
    if deterministic:
        return "error"
    return "warn" if exactness(deterministic, on_gpu).holds else "default"


def attention_backends(deterministic: bool, on_gpu: bool) -> set[SDPBackend]:
    """Return the kernels that scaled_dot_product_attention may choose from. On a CPU there are two;
    memory-efficient and cuDNN's are for GPUs alone."""
    backends = {SDPBackend.FLASH_ATTENTION, SDPBackend.MATH}
    if on_gpu:
        backends.add(SDPBackend.EFFICIENT_ATTENTION)
    if not exactness(deterministic, on_gpu).holds:
        backends.add(SDPBackend.CUDNN_ATTENTION)
    return backends


def use_kernels(deterministic: bool, on_gpu: bool) -> None:
    """Make torch use the kernels that `train.deterministic` names, for the rest of the process."""
    mode = mode_of(deterministic, on_gpu)
    if mode != "default":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The same flags as use_deterministic_algorithms, which imports torch's compiler to set it too,
    # in each rank that compiles nothing. See set_compiler_mode.
    torch.set_deterministic_debug_mode(mode)
    # Only useful for debugging, and costs one pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    chosen = attention_backends(deterministic, on_gpu)
    # Flash, memory-efficient and math are deterministic in the raising form: they stay on.
    torch.backends.cuda.enable_cudnn_sdp(SDPBackend.CUDNN_ATTENTION in chosen)


_FLASH = {
    "fa3": ("Hopper", "flash-attn-3", {9}),
    "fa4": ("Hopper or Blackwell", "flash-attn-4", {9, 10}),
}


def use_flash(kernel: str, on_gpu: bool) -> None:
    """Make torch use the flash attention that `train.attention_kernel` names, for the rest of the
    process. Raises UserError if this machine lacks its package or a GPU for it."""
    if kernel == "torch":
        return
    where, (gpus, package, majors) = f"train.attention_kernel={kernel}", _FLASH[kernel]
    if not on_gpu or torch.cuda.get_device_capability()[0] not in majors:
        raise UserError(where, f"is for a GPU of the kind {gpus}", "leave it out")
    try:
        activate_flash_attention_impl(kernel.upper())
    except (ImportError, RuntimeError, ValueError) as e:
        problem = f"torch can't use the package {package} ({e})"
        raise UserError(where, problem, "install it, or leave the key out") from e
    torch.backends.cuda.enable_cudnn_sdp(False)  # which torch prefers on these GPUs


def set_compiler_mode() -> None:
    """Set the mode that `use_kernels` has set in torch in its compiler too."""
    torch.use_deterministic_algorithms(
        torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def as_refused(error: Exception) -> UserError | None:
    """Return the UserError for an operation that has no deterministic kernel; None for any other
    error."""
    if not isinstance(error, RuntimeError) or not (match := _REFUSED.search(str(error))):
        return None
    return UserError(
        "train.deterministic=true",
        f"the model uses {match[1]}, which has no kernel that gives the same bits each time",
        "set train.deterministic=false, or use another operation in the model",
    )
