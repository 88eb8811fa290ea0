"""Cross-entropy of the next token without storing all logits, and the z-loss.

The logits (tokens x vocabulary) are by far the largest tensor of a step. Here they exist for one
chunk of tokens at a time: the backward pass recomputes the logits of a chunk and turns them into
gradients in place. This costs one more matrix product with the head. On a CPU a chunk stays in the
cache, so this is still faster than the whole for a small vocabulary without compilation; with
compilation it is 10% to 25% slower (tests/benchmarks/run.py loss). If all targets fit in one chunk,
the logits are kept and nothing is recomputed. ModelConfig.targets_at_once is the size of a chunk.
A compiler finds that both passes make the same logits: it keeps those of all chunks, in the
precision of the weights, and makes none again.
Softmax and sums are fp32 for every dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from forescale.models.config import PRODUCTS_AT_ONCE
from forescale.models.parallel.groups import TensorGroup

IGNORE = -100  # marks a position without a target: padding, or a token that has no loss


def capped(logits: Tensor, softcap: float) -> Tensor:
    """Return softcap * tanh(logits / softcap) (Gemma 2, 2024, arXiv 2408.00118); 0: the logits."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def window_losses(
    hidden_BLD: Tensor,
    weight_VD: Tensor,
    targets_BL: Tensor,
    chunk: int = 0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    bias_V: Tensor | None = None,
    group: TensorGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return each window's sum of cross-entropy over its targets: losses (B,) in nats, fp32.

    With z_loss > 0: (losses, penalty), where penalty is z_loss * log(Z)^2 summed over all targets,
    a scalar that belongs to the training objective only (PaLM, arXiv 2204.02311, section 5).
    softcap: see `capped`; bias (V,): added to the logits before. group: the ranks that divide the
    rows of weight and bias, each of which gets the same losses.
    """
    targets_N = targets_BL.flatten()
    losses_N, log_z_N = token_losses(
        hidden_BLD.flatten(0, 1), weight_VD, targets_N, chunk, softcap, bias_V, group
    )
    losses_B = losses_N.view(targets_BL.shape).sum(-1)
    if not z_loss:
        return losses_B
    return losses_B, z_loss * log_z_N.square().masked_fill(targets_N == IGNORE, 0.0).sum()


def token_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    chunk: int = 0,
    softcap: float = 0.0,
    bias_V: Tensor | None = None,
    group: TensorGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and log-partition of each token.

    Args: hidden (N, D), head weight (V, D), targets (N,) int64, `chunk` tokens at once (0: all),
    softcap of the logits (0: off), their bias (V,), the ranks that divide V.
    Returns: losses (N,) in nats, 0 where the target is IGNORE, and log Z (N,); both fp32.
    """
    size = chunk or len(targets_N)
    return _TokenLosses.apply(hidden_ND, weight_VD, targets_N, size, softcap, bias_V, group)


def _index(targets_N: Tensor, rows: int, group: TensorGroup | None) -> tuple[Tensor, Tensor]:
    """(N,) -> absent (N,) bool, index (N, 1) of the target's logit among `rows`, 0 where that is
    absent: ignored, or another rank's."""
    if group is None:
        absent_N = targets_N == IGNORE
    else:
        targets_N = targets_N - group.rank * rows
        absent_N = (targets_N < 0) | (targets_N >= rows)
    return absent_N, targets_N.masked_fill(absent_N, 0)[:, None]


@torch.library.custom_op("forescale::settle", mutates_args={"sum_VD"})
def _settle(sum_VD: Tensor) -> None:
    """Do nothing, with a sum that the compiler must have computed before. Left alone, it adds the
    products of all chunks at the end, each of the size of the table."""


def _saves_memory(hidden_ND: Tensor) -> bool:
    """True where a chunk's logits must end before those of the next begin, though a compiler would
    keep them: on a GPU. On a CPU time is dearer than memory."""
    return hidden_ND.is_cuda and torch.compiler.is_compiling()


class _TokenLosses(torch.autograd.Function):
    """Forward and backward, one chunk (C tokens) at a time; can be differentiated once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        chunk: int,
        softcap: float,
        bias_V: Tensor | None,
        group: TensorGroup | None,
    ) -> tuple[Tensor, Tensor]:
        log_z, chosen = [], []
        saves_memory, chunks = _saves_memory(hidden_ND), hidden_ND.split(chunk)
        if saves_memory:
            # The compiler takes operations that both passes have for one, and would keep all logits
            # (torch._functorch.config.cse). The backward pass splits, so here are slices.
            chunks = tuple(hidden_ND[i : i + chunk] for i in range(0, len(hidden_ND), chunk))
        for hidden_CD, targets_C in zip(chunks, targets_N.split(chunk), strict=True):
            logits_CV = capped(F.linear(hidden_CD, weight_VD, bias_V), softcap)
            absent_C, index_C1 = _index(targets_C, len(weight_VD), group)
            log_z.append(logits_CV.float().logsumexp(-1))
            if saves_memory:  # one kernel with the line above, not one of all chunks at the end
                is_target_CV = torch.arange(len(weight_VD), device=index_C1.device) == index_C1
                chosen_C = torch.where(is_target_CV, logits_CV.float(), 0.0).sum(-1)
            else:
                chosen_C = logits_CV.gather(1, index_C1)[:, 0].float()
            chosen.append(chosen_C.masked_fill(absent_C, 0.0))
        log_z_N, chosen_N = torch.cat(log_z), torch.cat(chosen)
        if group is not None:
            log_z_N, chosen_N = group.pooled(log_z_N, chosen_N)
        whole = logits_CV if len(log_z) == 1 else None
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, log_z_N, whole, bias_V)
        ctx.chunk, ctx.softcap, ctx.group = chunk, softcap, group
        return (log_z_N - chosen_N).masked_fill(targets_N == IGNORE, 0.0), log_z_N

    @staticmethod
    def backward(ctx: Any, grad_losses_N: Tensor, grad_log_z_N: Tensor) -> Any:
        hidden_ND, weight_VD, targets_N, log_z_N, whole, bias_V = ctx.saved_tensors
        absent_N, index_N1 = _index(targets_N, len(weight_VD), ctx.group)
        grad_all_N = grad_losses_N.masked_fill(targets_N == IGNORE, 0.0) + grad_log_z_N
        grad_target_N = grad_losses_N.masked_fill(absent_N, 0.0)
        grad_weight_VD = None
        if ctx.needs_input_grad[1]:  # else it is frozen
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        grad_hidden = []
        rows = (hidden_ND, index_N1, log_z_N, grad_target_N, grad_all_N)
        chunks = zip(*(x.split(ctx.chunk) for x in rows), strict=True)
        for i, (hidden_CD, index_C1, log_z_C, grad_target_C, grad_all_C) in enumerate(chunks):
            logits_CV = whole
            if whole is None:
                logits_CV = capped(F.linear(hidden_CD, weight_VD, bias_V), ctx.softcap)
            # d log Z / d logits = softmax; d loss / d logits = softmax - onehot
            grad_CV = (logits_CV - log_z_C[:, None]).exp_().mul_(grad_all_C[:, None])
            if torch.compiler.is_compiling():
                # One loop with the line above. The compiler's own scatter_add gives wrong gradients
                # on a CPU where chunks differ in size and kernels are deterministic (torch 2.13).
                own_CV = torch.arange(len(weight_VD), device=index_C1.device) == index_C1
                grad_CV = grad_CV - own_CV * grad_target_C[:, None]
            else:
                grad_CV.scatter_add_(1, index_C1, -grad_target_C[:, None])
            if ctx.softcap:  # d capped / d logits = 1 - tanh^2
                grad_CV.mul_(1 - (logits_CV / ctx.softcap).square())
            grad_CV = grad_CV.to(weight_VD.dtype)
            grad_hidden.append(grad_CV @ weight_VD)
            if grad_weight_VD is not None:
                if torch.compiler.is_compiling() and i and i % PRODUCTS_AT_ONCE == 0:
                    _settle(grad_weight_VD)
                grad_weight_VD += grad_CV.T @ hidden_CD
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0, dtype=torch.float32)
        if grad_bias_V is not None:
            grad_bias_V = grad_bias_V.to(weight_VD.dtype)
        whole_grad = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return torch.cat(grad_hidden), whole_grad, None, None, None, grad_bias_V, None
