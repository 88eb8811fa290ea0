"""A gated linear recurrence as a mixer: minGRU (Feng et al. 2024, arXiv 2410.01201).

    h_t = (1 - z_t) h_{t-1} + z_t v_t,   z_t = sigmoid(gate(x_t) - log_memory),   v_t = value(x_t)

Gate and value read the token alone, not the state. So the states of all tokens follow from a scan
of log2(L) passes over the sequence, and decoding needs one vector of state a layer.

Invariant: where the previous token isn't visible (another document, padding), the state starts
again from 0, exactly: no bit of another document arrives.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.init import Linear
from forescale.models.mixers.context import Context, continued, earlier
from forescale.models.parallel.groups import SequenceGroup
from forescale.models.parametrization import scales
from forescale.models.part import Part


def scan(a_BLD: Tensor, b_BLD: Tensor) -> Tensor:
    """Return h, (B, L, D), with h_t = a_t h_{t-1} + b_t and h_{-1} = 0, by doubling (Hillis and
    Steele 1986): after pass i, each entry holds the sum over its last 2^i tokens."""
    step = 1
    while step < b_BLD.shape[1]:
        earlier_a, earlier_b = earlier(a_BLD, step), earlier(b_BLD, step)
        b_BLD = b_BLD + a_BLD * earlier_b
        a_BLD = a_BLD * earlier_a
        step *= 2
    return b_BLD


def states(
    logit_BLD: Tensor, value_BLD: Tensor, keep_BL1: Tensor, before_B1D: Tensor | None = None
) -> Tensor:
    """Return the states of all tokens, (B, L, D) in fp32 or more; before: the state to begin with,
    None: 0. Other arguments as in Recurrence.forward."""
    precise = torch.promote_types(logit_BLD.dtype, torch.float32)
    z_BLD = torch.sigmoid(logit_BLD.to(precise))
    a_BLD, b_BLD = (1 - z_BLD) * keep_BL1, z_BLD * value_BLD.to(precise)
    if before_B1D is not None:
        b_BLD[:, :1] += a_BLD[:, :1] * before_B1D
    return scan(a_BLD, b_BLD)


class Recurrence(torch.autograd.Function):
    """States of all tokens from gates and values, in fp32 or more.

    The backward pass is the same scan from the last token to the first. Autograd through `scan`
    would keep the tensors of each pass: log2(L) times as many.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logit_BLD: Tensor,
        value_BLD: Tensor,
        keep_BL1: Tensor,
        group: SequenceGroup | None = None,
    ) -> Tensor:
        """Return h. logit, value (B, L, D); keep (B or 1, L, 1): 0 where the state starts again.
        group: the ranks that have the other columns, from which states come."""
        h_BLD, before_B1D = states(logit_BLD, value_BLD, keep_BL1), None
        if group is not None:
            weights = (1 - torch.sigmoid(logit_BLD.to(h_BLD.dtype))) * keep_BL1
            before_B1D = group.entering(weights.prod(1, keepdim=True), h_BLD[:, -1:])
            h_BLD = states(logit_BLD, value_BLD, keep_BL1, before_B1D)
        ctx.save_for_backward(logit_BLD, value_BLD, keep_BL1, h_BLD, before_B1D)
        ctx.group = group
        return h_BLD.to(value_BLD.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of logit and value."""
        logit_BLD, value_BLD, keep_BL1, h_BLD, before_B1D = ctx.saved_tensors
        z_BLD = torch.sigmoid(logit_BLD.to(h_BLD.dtype))
        # The state of token t enters token t + 1 with this weight.
        weights_BLD, grad_BLD = (1 - z_BLD) * keep_BL1, grad[0].to(h_BLD.dtype).flip(1)
        onward_BLD = earlier(weights_BLD.flip(1), 1)
        g_BLD = scan(onward_BLD, grad_BLD).flip(1)
        earlier_BLD = earlier(h_BLD, 1)
        if before_B1D is not None:
            first = weights_BLD[:, :1] * g_BLD[:, :1]
            whole = weights_BLD.prod(1, keepdim=True)
            after_B1D = ctx.group.entering(whole, first, back=True)
            grad_BLD = torch.cat([grad_BLD[:, :1] + after_B1D, grad_BLD[:, 1:]], 1)
            g_BLD = scan(onward_BLD, grad_BLD).flip(1)
            earlier_BLD = torch.cat([before_B1D, h_BLD[:, :-1]], 1)
        change_BLD = value_BLD.to(h_BLD.dtype) - keep_BL1 * earlier_BLD
        d_logit = g_BLD * change_BLD * z_BLD * (1 - z_BLD)
        return d_logit.to(logit_BLD.dtype), (g_BLD * z_BLD).to(value_BLD.dtype), None, None


class MinGRU(nn.Module):
    """(B, L, D) -> (B, L, D): the states of a gated linear recurrence, and a matrix after them.

    log_memory (D,): log of the number of tokens that each channel remembers at first, from 1 to
    max_sequence_length in equal ratios (chrono initialisation: Tallec and Ollivier 2018, arXiv
    1804.11188). Without it all channels would begin with a memory of two tokens. Positions, heads
    and QK-norm play no part.
    """

    def __init__(self, config: ModelConfig, part: Part):
        super().__init__()
        s, scale = config.sizes, scales(config)
        longest = math.log(max(2, s.max_sequence_length))
        self.log_memory = nn.Parameter(torch.linspace(0, longest, s.width))
        self.gate = Linear(s.width, s.width, config.bias, scale.hidden_std)
        self.value = Linear(s.width, s.width, config.bias, scale.hidden_std)
        self.output = Linear(s.width, s.width, config.bias, scale.writing_std)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        logit_BLD = self.gate(x_BLD) - self.log_memory
        value_BLD, keep_BL1 = self.value(x_BLD), continued(x_BLD, context)[..., None]
        memory = context.memory
        if memory is None:
            h_BLD = Recurrence.apply(logit_BLD, value_BLD, keep_BL1, context.group)
            return self.output(h_BLD)
        # Decoding has no gradients, and begins where the last call ended.
        h_BLD = states(logit_BLD, value_BLD, keep_BL1, memory.get("state"))
        memory["state"] = h_BLD[:, -1:].clone()
        return self.output(h_BLD.to(value_BLD.dtype))
