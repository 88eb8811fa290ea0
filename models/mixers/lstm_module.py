"""The LSTM as a mixer, a layer of torch.nn.LSTM (Hochreiter and Schmidhuber 1997, doi
10.1162/neco.1997.9.8.1735).

    i, f, g, o = gates(x_t, h_{t-1}),   c_t = f c_{t-1} + i g,   h_t = o tanh(c_t)

The gates read the state before, so the tokens of a row are computed one after the other, also in
training: only rows and channels are parallel. torch.compile can't trace nn.LSTM: it breaks the
graph around it, compiles what lies between, and calls the layer as it is.

Invariant: where the previous token isn't visible (another document, padding), the state starts
again from 0, exactly: no bit of another document arrives.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from forescale.models.config import ModelConfig
from forescale.models.init import Linear
from forescale.models.mixers.context import CHANGES_PRODUCTS, Context, continued
from forescale.models.parallel.groups import SequenceGroup
from forescale.models.parametrization import scales
from forescale.models.part import Part

State = tuple[Tensor, Tensor]  # h and c, (B, D) each


class Recurrence(nn.LSTM):
    """One layer, (B, L, D) -> (B, L, D), whose rows may consist of segments that begin anew.

    Gate matrices have standard deviation `std`, biases are 0, but for the forget gate's, which is 1
    (Jozefowicz, Zaremba and Sutskever 2015, section 2.2): at first a channel keeps 73 % a token.
    """

    def __init__(self, width: int, std: float):
        self.std, self.width = std, width  # before nn.LSTM's constructor, which needs them
        super().__init__(width, width, batch_first=True)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights; called by the constructor of nn.LSTM."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, self.std)
            else:
                parameter.zero_()
            if name == "bias_ih_l0":  # of input, forget, cell and output gate
                parameter[self.width : 2 * self.width] = 1

    def forward(  # type: ignore[override]
        self, x_BLD: Tensor, keep_BL: Tensor | None = None, before: State | None = None
    ) -> tuple[Tensor, State]:
        """Return the states h of all tokens, and the last h and c of each row.

        keep (B, L): 0 where the state starts again, else 1; None: it never does. before: the state
        to begin with; None: 0.
        """
        B, L, _ = x_BLD.shape
        if before is None:
            before = (x_BLD.new_zeros(B, self.width), x_BLD.new_zeros(B, self.width))
        if keep_BL is not None:
            before = (before[0] * keep_BL[:, :1], before[1] * keep_BL[:, :1])
        if keep_BL is None or L == 1:
            h_BLD, (h_1BD, c_1BD) = self._states(x_BLD, (before[0][None], before[1][None]))
            return h_BLD, (h_1BD[0], c_1BD[0])
        return self._segments(x_BLD, keep_BL, before)

    def _states(self, x: Any, before: State) -> tuple[Any, State]:
        """Return what nn.LSTM returns. Its plain form adds the products of inputs to those of
        states in place (aten/src/ATen/native/RNN.cpp)."""
        token = CHANGES_PRODUCTS.set(True)
        try:
            states: tuple[Any, State] = super().forward(x, before)
        finally:
            CHANGES_PRODUCTS.reset(token)
        return states

    def _segments(self, x_BLD: Tensor, keep_BL: Tensor, before: State) -> tuple[Tensor, State]:
        """Compute each segment as a sequence of its own; only the first of a row has a state before
        it. Takes as many steps as the longest segment has tokens."""
        B, L, _ = x_BLD.shape
        begins_BL = keep_BL == 0
        begins_BL[:, 0] = True
        first_N = begins_BL.flatten().nonzero()[:, 0]
        number_T = begins_BL.flatten().cumsum(0) - 1  # the segment of each of the B * L tokens
        count = len(first_N)
        offset_T = torch.arange(B * L, device=x_BLD.device) - first_N[number_T]
        # A packed sequence wants the longest first, and all first tokens before all second ones.
        by_length_N = number_T.bincount().argsort(descending=True, stable=True)
        rank_N = by_length_N.argsort()
        order_T = (offset_T * count + rank_N[number_T]).argsort()
        packed = PackedSequence(x_BLD.flatten(0, 1)[order_T], offset_T.bincount().cpu())
        rows_BL = rank_N[number_T].view(B, L)
        h_1ND, c_1ND = (x_BLD.new_zeros(1, count, self.width) for _ in before)
        h_1ND[0, rows_BL[:, 0]], c_1ND[0, rows_BL[:, 0]] = before
        out, (h_1ND, c_1ND) = self._states(packed, (h_1ND, c_1ND))
        last_B = rows_BL[:, -1]
        return out.data[order_T.argsort()].view_as(x_BLD), (h_1ND[0, last_B], c_1ND[0, last_B])


class _Onward(torch.autograd.Function):
    """A recurrence whose state comes from the rank before and goes on to the next; its gradient
    comes back.

    The backward pass makes the states again, with a graph of its own: gradients must go on to the
    rank before, which waits for them, ahead of those of the weights, for which all ranks meet.
    """

    @staticmethod
    def forward(
        ctx: Any,
        recurrence: Recurrence,
        group: SequenceGroup,
        x_BLD: Tensor,
        keep_BL: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        """Return the states of all tokens; weights: of the recurrence, which have gradients."""
        before_2BD = group.received(torch.stack([x_BLD[:, 0]] * 2), -1)
        h_BLD, after = recurrence(x_BLD, keep_BL, (before_2BD[0], before_2BD[1]))
        group.send(torch.stack(after), 1)
        ctx.save_for_backward(x_BLD, keep_BL, before_2BD)
        ctx.recurrence, ctx.group, ctx.weights = recurrence, group, weights
        return h_BLD

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and the weights."""
        x_BLD, keep_BL, before_2BD = ctx.saved_tensors
        with torch.enable_grad():
            x_BLD, before_2BD = (x.detach().requires_grad_() for x in (x_BLD, before_2BD))
            h_BLD, after = ctx.recurrence(x_BLD, keep_BL, (before_2BD[0], before_2BD[1]))
            after_2BD = torch.stack(after)
        d_after = ctx.group.received(after_2BD, 1)
        inputs = before_2BD, x_BLD, *ctx.weights
        d_before, *rest = torch.autograd.grad((h_BLD, after_2BD), inputs, (grad[0], d_after))
        ctx.group.send(d_before, -1)
        return None, None, rest[0], None, *rest[1:]


@torch._disable_dynamo  # which can't trace nn.LSTM either; see parallel/groups.py
def _onward(
    recurrence: Recurrence, group: SequenceGroup, x_BLD: Tensor, keep_BL: Tensor | None
) -> Tensor:
    weights = [weight for weight in recurrence.parameters() if weight.requires_grad]
    return _Onward.apply(recurrence, group, x_BLD, keep_BL, *weights)


class LSTM(nn.Module):
    """(B, L, D) -> (B, L, D): the states of an LSTM of width D, and a matrix after them.

    The matrix writes to the residual stream, with the standard deviation of all that do, as
    attention's output does: states alone, below 1, would be too large in a deep model, and no
    parametrisation could scale them. Residual and norm are the block's. The gates have two biases
    each, as nn.LSTM's, also with bias=false. Positions, heads and QK-norm play no part.
    """

    def __init__(self, config: ModelConfig, part: Part):
        super().__init__()
        width, scale = config.sizes.width, scales(config)
        self.recurrence = Recurrence(width, scale.hidden_std)
        self.output = Linear(width, width, config.bias, scale.writing_std)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        memory = context.memory
        is_cut = context.starts is not None or context.real is not None
        keep_BL = continued(x_BLD, context) if is_cut else None
        before = None
        if context.group is not None:
            return self.output(_onward(self.recurrence, context.group, x_BLD, keep_BL))
        if memory is not None and not memory.is_empty:
            before = (memory.get("hidden"), memory.get("cell"))
        h_BLD, after = self.recurrence(x_BLD, keep_BL, before)
        if memory is not None:
            memory["hidden"], memory["cell"] = after
        return self.output(h_BLD)
