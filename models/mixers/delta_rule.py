"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464), chunk by chunk.

A head has a state S, (K, V), that answers a key with a value. Each token lets it decay and corrects
what it answers to the token's key:

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T,   o_t = S_t^T q_t / sqrt(K)

with decay a_t in (0, 1), writing strength b_t in (0, 1), and q_t and k_t of length 1. All
corrections of a chunk of C tokens follow from one triangular system (the WY representation and UT
transform: Yang et al. 2024, arXiv 2406.06484, section 3.2; with decays 2412.06464, section 3.3), so
only one state a chunk is made in turn. Here N is the number of chunks and E that of rows times
heads; everything is computed in fp32 or more.

Invariant: where the token before isn't visible (another document, padding), the state starts again
from 0: all weights across are exactly 0. Decays are exponentials of sums between two tokens, and
never quotients, so they can't overflow.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from forescale.models.mixers.gated_deltanet import chunks
from forescale.models.parallel.groups import SequenceGroup

_EPS = 1e-6  # added to the squared length of queries and keys, as in the authors' kernels


class _Chunks(NamedTuple):
    """What can be said of each chunk without the state before it; each tensor is (N, E, C, ...)."""

    q: Tensor  # (..., K), of length 1, over sqrt(K)
    k: Tensor  # (..., K), of length 1
    q_scale: Tensor  # (..., 1): 1 / the length before
    k_scale: Tensor
    v: Tensor  # (..., V)
    beta: Tensor  # (..., 1)
    reach: Tensor  # (..., C + 1): the decay since the state before, and since each token
    key_scores: Tensor  # (..., C): keys with keys
    query_scores: Tensor  # (..., C): queries with keys
    inverse: Tensor  # (..., C): of the triangular system
    u: Tensor  # (..., V): the corrections, if the state before were 0
    w: Tensor  # (..., K): their part for each key of the state before

    @property
    def since(self) -> Tensor:
        """The decay since the state before, (..., 1)."""
        return self.reach[..., :1]

    @property
    def decay(self) -> Tensor:
        """The decay from a token (column) to a later one (row), (..., C); 0 to an earlier one."""
        return self.reach[..., 1:]

    @property
    def until(self) -> Tensor:
        """The decay until the end of the chunk, (..., 1)."""
        return self.decay[..., -1, :, None]

    @property
    def whole(self) -> Tensor:
        """The decay over the whole chunk, (N, E, 1, 1)."""
        return self.since[..., -1:, :]


def delta_rule(
    q_BLHK: Tensor,
    k_BLHK: Tensor,
    v_BLHV: Tensor,
    log_decay_BLH: Tensor,
    beta_BLH: Tensor,
    keep_BL: Tensor,
    state_BHKV: Tensor | None = None,
    group: SequenceGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs (B, L, H, V), the states before each chunk (N, E, K, V), the last state.

    q, k: of any length. keep (B or 1, L): 0 where the state starts again from 0. state: before the
    first token; None: 0, or with a group, the ranks that have the other columns, the state that
    those before this one leave. Autograd through it keeps everything; use DeltaRule.
    """
    c = _chunks(q_BLHK, k_BLHK, v_BLHV, log_decay_BLH, beta_BLH, keep_BL)
    (B, L, H, K), V = q_BLHK.shape, v_BLHV.shape[-1]
    state = c.u.new_zeros(B * H, K, V) if state_BHKV is None else state_BHKV.flatten(0, 1)
    in_turn = _states_at_once if torch.compiler.is_compiling() else _states
    if group is not None:
        state = group.entering(_passing(c), in_turn(*_rule(c), state)[2], times=torch.matmul)
    states_NEKV, corrections_NECV, state = in_turn(*_rule(c), state)
    o_NECV = (c.q * c.since) @ states_NEKV
    o_NECV = o_NECV + (c.query_scores * c.decay) @ corrections_NECV
    o_BLHV = _joined(o_NECV, B, L).to(v_BLHV.dtype)
    return o_BLHV, states_NEKV, state.reshape(B, H, K, V)


class DeltaRule(torch.autograd.Function):
    """Outputs of all tokens, from no state before, or from that of the ranks before.

    It keeps its inputs and a state a chunk; the backward pass makes the rest again. Autograd
    through `delta_rule` would keep some 18 values for each of v in fp32.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return o (B, L, H, V). inputs: as for delta_rule, without a state, and its group."""
        tensors, ctx.group = inputs[:6], inputs[6] if len(inputs) > 6 else None
        o_BLHV, states_NEKV, _ = delta_rule(*tensors, group=ctx.group)  # type: ignore[misc]
        ctx.save_for_backward(*tensors, states_NEKV)
        return o_BLHV

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k, v, log_decay and beta."""
        *inputs, states_NEKV = ctx.saved_tensors
        c = _chunks(*inputs)
        B, L = inputs[0].shape[:2]
        d_o_NECV = _chunked(grad[0], states_NEKV.dtype)
        new_NECV = c.u - c.w @ states_NEKV
        in_turn = _gradients_at_once if torch.compiler.is_compiling() else _gradients_of_states
        of_outputs = (c.query_scores * c.decay).mT @ d_o_NECV, (c.q * c.since).mT @ d_o_NECV
        d_state = torch.zeros_like(states_NEKV[0])
        if ctx.group is not None:
            before = in_turn(*of_outputs, *_rule(c)[1:], d_state)[2]
            d_state = ctx.group.entering(_passing(c).mT, before, True, torch.matmul)
        d_new_NECV, d_after_NEKV, _ = in_turn(*of_outputs, *_rule(c)[1:], d_state)
        gradients = _gradients(c, states_NEKV, new_NECV, d_o_NECV, d_new_NECV, d_after_NEKV)
        q, k, v, log_decay, beta = (_joined(x, B, L) for x in gradients)
        log_decay = log_decay[..., 0] * inputs[5][..., None]
        d = (q, k, v, log_decay, beta[..., 0])
        return *(new.to(old.dtype) for new, old in zip(d, inputs, strict=False)), None, None


def _chunked(x_BLHK: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B, L, H, K) as (N, E, C, K), padded with zeros: such tokens change nothing."""
    B, L, H, K = x_BLHK.shape
    num, size = chunks(L)
    x_BLHK = F.pad(x_BLHK.to(dtype), (0, 0, 0, 0, 0, num * size - L))
    return x_BLHK.reshape(B, num, size, H, K).permute(1, 0, 3, 2, 4).reshape(num, B * H, size, K)


def _joined(x_NECK: Tensor, B: int, L: int) -> Tensor:
    """Return (N, E, C, K) as (B, L, H, K): what _chunked took apart."""
    num, E, size, K = x_NECK.shape
    x_BLHK = x_NECK.reshape(num, B, E // B, size, K).permute(1, 0, 3, 2, 4)
    return x_BLHK.reshape(B, num * size, E // B, K)[:, :L].contiguous()


def _chunks(
    q_BLHK: Tensor,
    k_BLHK: Tensor,
    v_BLHV: Tensor,
    log_decay_BLH: Tensor,
    beta_BLH: Tensor,
    keep_BL: Tensor,
) -> _Chunks:
    """Return all that needs no state. Arguments as for delta_rule."""
    precise = torch.promote_types(q_BLHK.dtype, torch.float32)
    log_BLH = log_decay_BLH.masked_fill(keep_BL[..., None] == 0, -torch.inf)
    q, k, v, log, beta = (
        _chunked(x, precise)
        for x in (q_BLHK, k_BLHK, v_BLHV, log_BLH[..., None], beta_BLH[..., None])
    )
    q_scale, k_scale = (torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS) for x in (q, k))
    q, k = q * (q_scale * q.shape[-1] ** -0.5), k * k_scale
    C = q.shape[2]
    # Entry (i, j) sums the logarithms after token j - 1 until token i: the rows below the diagonal.
    reach = _summed(log.expand(*log.shape[:3], C + 1).tril(), -2).exp().tril(1)
    since, decay = reach[..., :1], reach[..., 1:]
    key_scores = k @ k.mT
    system = (key_scores * decay * beta).tril(-1)  # its diagonal of ones is implied below
    eye = torch.eye(C, dtype=precise, device=q.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)
    return _Chunks(
        q, k, q_scale, k_scale, v, beta, reach,
        key_scores, q @ k.mT, inverse, inverse @ (v * beta), inverse @ (k * (beta * since)),
    )  # fmt: skip


def _rule(c: _Chunks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the states follow from, apart from the first."""
    return c.u, c.w, c.k * c.until, c.whole


def _passing(c: _Chunks) -> Tensor:
    """Return the matrices (E, K, K) by which the last state depends on the first: what all tokens
    leave of the unit matrix, where they write nothing."""
    states = torch.eye(c.k.shape[-1], dtype=c.k.dtype, device=c.k.device).expand(
        c.k.shape[1], -1, -1
    )
    in_turn = _states_at_once if torch.compiler.is_compiling() else _states
    _, w, until_k, whole = _rule(c)
    return in_turn(torch.zeros_like(w), w, until_k, whole, states.contiguous())[2]


def _states(
    u_NECV: Tensor, w_NECK: Tensor, until_k_NECK: Tensor, whole_NE11: Tensor, state_EKV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states before each chunk (N, E, K, V), the corrections (N, E, C, V) and the last
    state. until_k: keys times the decay until the chunk's end; state: before the first token."""
    states, corrections = [], []
    for n in range(len(u_NECV)):
        states.append(state_EKV)
        corrections.append(torch.baddbmm(u_NECV[n], w_NECK[n], state_EKV, alpha=-1))
        decayed = whole_NE11[n] * state_EKV
        state_EKV = torch.baddbmm(decayed, until_k_NECK[n].mT, corrections[-1])
    return torch.stack(states), torch.stack(corrections), state_EKV


def _gradients_of_states(
    d_new_NECV: Tensor,
    d_read_NEKV: Tensor,
    w_NECK: Tensor,
    until_k_NECK: Tensor,
    whole_NE11: Tensor,
    d_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the corrections (N, E, C, V), of the state after each chunk, and of
    the first state.

    d_new, d_read: the parts of corrections and states that come from outputs alone; d_state: the
    gradient of the last state.
    """
    new, after = [], []
    for n in reversed(range(len(d_new_NECV))):
        after.append(d_state)
        new.append(torch.baddbmm(d_new_NECV[n], until_k_NECK[n], d_state))
        d_kept = d_read_NEKV[n] + whole_NE11[n] * d_state
        d_state = torch.baddbmm(d_kept, w_NECK[n].mT, new[-1], alpha=-1)
    return torch.stack(new[::-1]), torch.stack(after[::-1]), d_state


# Each as one operation for the compiler, which would unroll the loops: 24 nodes a chunk and layer.
_states_at_once = torch.library.custom_op("forescale::delta_states", _states, mutates_args=())
_gradients_at_once = torch.library.custom_op(
    "forescale::delta_gradients", _gradients_of_states, mutates_args=()
)


@_states_at_once.register_fake
def _like_states(
    u_NECV: Tensor, w_NECK: Tensor, until_k_NECK: Tensor, whole_NE11: Tensor, state_EKV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    states_NEKV = state_EKV.new_empty(len(u_NECV), *state_EKV.shape)
    return states_NEKV, u_NECV.new_empty(u_NECV.shape), state_EKV.new_empty(state_EKV.shape)


@_gradients_at_once.register_fake
def _like_gradients(
    d_new_NECV: Tensor,
    d_read_NEKV: Tensor,
    w_NECK: Tensor,
    until_k_NECK: Tensor,
    whole_NE11: Tensor,
    d_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    like = d_new_NECV, d_read_NEKV, d_state
    return tuple(x.new_empty(x.shape) for x in like)  # type: ignore[return-value]


def _gradients(
    c: _Chunks, states: Tensor, new: Tensor, d_o: Tensor, d_new: Tensor, d_after: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, log_decay and beta, each (N, E, C, its width).

    new: the corrections; the other arguments as they are called above, in chunks.
    """
    q, k, v, beta, decay, since = c.q, c.k, c.v, c.beta, c.decay, c.since
    d_weights = d_o @ new.mT
    d_since_q, d_until_k = d_o @ states.mT, new @ d_after.mT
    d_v = c.inverse.mT @ d_new  # of v * beta
    d_w = c.inverse.mT @ (d_new @ states.mT).neg()  # of k * beta * since
    d_system = (d_v @ c.u.mT + d_w @ c.w.mT).neg().tril(-1)
    d_query_scores, d_key_scores = d_weights * decay, d_system * decay * beta
    d_q = d_query_scores @ k + d_since_q * since
    d_k = d_query_scores.mT @ q + (d_key_scores + d_key_scores.mT) @ k
    d_k = d_k + d_until_k * c.until + d_w * (beta * since)
    w_k, read = _dot(d_w, k), c.key_scores * decay
    d_beta = _dot(d_system, read) + w_k * since + _dot(d_v, v)
    # Each entry of reach is the exponential of a sum: times itself is the gradient of the sum.
    d_since = _dot(d_since_q, q) + w_k * beta
    d_decay = d_system * c.key_scores * beta + d_weights * c.query_scores
    d_reach = torch.cat([d_since, d_decay], -1)
    d_reach[..., -1, 0] += (states * d_after).sum((-2, -1))
    d_reach[..., -1, 1:] += _dot(d_until_k, k)[..., 0]
    d_reach = d_reach * c.reach
    # Entry (i, j) has the logarithm of token t if j <= t <= i. These are summed alone: differences
    # of sums over the chunk would round, and carry bits of other documents.
    d_log = _summed(d_reach[..., :-1], -1).tril().sum(-2)[..., None]
    scale = q.shape[-1] ** -0.5
    d_q = c.q_scale * scale * (d_q - q * (_dot(q, d_q) / scale**2))
    d_k = c.k_scale * (d_k - k * _dot(k, d_k))
    return d_q, d_k, d_v * beta, d_log, d_beta


def _summed(x: Tensor, dim: int) -> Tensor:
    """Return the running sums of x along a dimension. torch's own of fractions add in any order on
    CUDA, and raise an error where one order is asked for."""
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _summed_in_order(x, dim)
    return x.cumsum(dim)


def _summed_in_order(x: Tensor, dim: int) -> Tensor:
    """Return the same by doubling: after pass n each place holds the sum of its last 2^n."""
    x, step = x.movedim(dim, -1), 1
    while step < x.shape[-1]:
        x = x + F.pad(x[..., :-step], (step, 0))
        step *= 2
    return x.movedim(-1, dim)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of vectors, (..., K) and (..., K) -> (..., 1)."""
    return (a * b).sum(-1, keepdim=True)
