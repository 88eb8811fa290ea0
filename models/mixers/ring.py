"""Attention of rows whose columns are in a ring of ranks (Liu, Zaharia and Abbeel 2023, arXiv
2310.01889; two runs a rank: Brandon et al. 2023, arXiv 2311.09431).

A rank has the queries of its own columns. The keys and values of all pass by, a rank's at a time,
and the next ones travel while these are scored. Each block gives outputs and the log of its sum of
exponentials, by which outputs of several blocks become those of one softmax, in fp32. The backward
pass goes round again: a block's part of the gradients follows from the outputs and the sums of the
whole, and the gradients of keys and values travel on with them, and home.

Who sees whom follows from columns, documents and padding, which every rank has of whole rows, so no
mask travels, and none is larger than a tile of queries. Invariant: blocks that are hidden by order
or by a window are neither scored nor, if they are so for all ranks, sent.

torch's own (torch.distributed.tensor.experimental, 2.13) takes CUDA kernels without masks alone:
no documents, no windows, no biases, no CPU; by flex_attention it gathers all keys on each rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from forescale.models.mixers.context import Columns
from forescale.models.mixers.masks import sees
from forescale.models.parallel.deal import Ring, Tile, shifts, tiles
from forescale.models.parallel.groups import SequenceGroup
from forescale.models.positions.position import positions_of

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
_FLASH = torch.float16, torch.bfloat16


class _Block:
    """What hides keys and adds to scores, for any tile; and the kernels that score it.

    masked: documents, padding, a window or biases play a part, so that tiles have masks.
    """

    def __init__(
        self,
        q_BHLK: Tensor,
        ring: Ring,
        starts: Tensor | None,
        real: Tensor | None,
        slopes: Tensor | None,
        scale: float,
    ):
        self.slopes, self.scale = slopes, scale
        length = q_BHLK.shape[2] * ring.size
        positions = positions_of(length, q_BHLK.device, real, starts)
        columns = Columns(positions, length, starts, real)
        self.positions = positions if positions.dim() == 2 else positions[None]
        self.rows = torch.arange(len(self.positions), device=q_BHLK.device)[:, None, None]
        self.see = sees(columns, bool(ring.causal), ring.window, ring.global_tokens)
        self.masked = not (starts is None and real is None and slopes is None and not ring.window)

    def bias(self, tile: Tile, q_BHLK: Tensor) -> Tensor | None:
        """Return what is added to the scores of a tile, (B, H, queries, keys); None: nothing."""
        if not self.masked:
            return None
        queries, keys = (part.stop - part.start for part in (tile.queries, tile.keys))
        device, dtype = q_BHLK.device, q_BHLK.dtype
        query_T1 = torch.arange(tile.query, tile.query + queries, device=device)[:, None]
        key_S = torch.arange(tile.key, tile.key + keys, device=device)
        visible = self.see(self.rows, self.rows, query_T1, key_S)
        visible = visible.expand(len(self.rows), queries, keys)[:, None]
        # Not -inf: a tile may have queries that see none of its keys, whose sum must be a number.
        lowest = torch.finfo(dtype).min / 2
        # Kernels of CUDA want rows of a multiple of 16 bytes.
        shape = (len(visible), 1 if self.slopes is None else len(self.slopes), queries)
        bias = torch.zeros(*shape, -(-keys // 16) * 16, dtype=dtype, device=device)[..., :keys]
        if self.slopes is not None:
            positions = self.positions
            ahead = positions[:, None, key_S] - positions[:, query_T1]
            bias += (self.slopes[:, None, None] * ahead[:, None]).to(dtype)
        bias = bias.masked_fill_(~visible, lowest)
        return bias.expand(*q_BHLK.shape[:2], -1, -1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Return the outputs (B, H, queries, K), and the log of the sum of exponentials (B, H,
        queries)."""
        bias, causal, scale = self.bias(tile, q), tile.causal, self.scale
        if _flash_takes(q, bias):
            kernel = _aten._scaled_dot_product_flash_attention
            out, log, *_ = kernel(q, k, v, 0.0, causal, False, scale=scale)
            return out, log
        k, v = _repeated(k, q), _repeated(v, q)
        if q.device.type == "cpu":
            kernel = _aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        kernel = _aten._scaled_dot_product_efficient_attention
        out, log, *_ = kernel(q, k, v, bias, True, 0.0, causal, scale=scale)
        return out, log[:, :, : q.shape[2]]

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log: Tensor, tile: Tile
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tile's part of the gradients of q, k and v. out and log: of all keys that the
        queries see; the kernels make the weights of these keys from the whole sum."""
        bias, causal, scale = self.bias(tile, q), tile.causal, self.scale
        log, heads = log.contiguous(), k.shape[1]  # kernels take no strides of it
        if _flash_takes(q, bias):
            draws = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout: not read
            kernel = _aten._scaled_dot_product_flash_attention_backward
            sizes = None, None, q.shape[2], k.shape[2]
            dropout = 0.0, causal, draws, draws[0]
            return kernel(d_out, q, k, v, out, log, *sizes, *dropout, scale=scale)
        k, v = _repeated(k, q), _repeated(v, q)
        if q.device.type == "cpu":
            kernel = _aten._scaled_dot_product_flash_attention_for_cpu_backward
            inputs = d_out, q, k, v, out, log, 0.0, causal
            d_q, d_k, d_v = kernel(*inputs, attn_mask=bias, scale=scale)
        else:
            log = F.pad(log, (0, -log.shape[2] % 32))  # as the forward kernel pads it
            draws = torch.empty((), dtype=torch.int64, device=q.device)
            kernel = _aten._scaled_dot_product_efficient_attention_backward
            rest = draws, draws, 0.0, [True, True, True, False], causal
            d_q, d_k, d_v, _ = kernel(d_out, q, k, v, bias, out, log, *rest, scale=scale)
        # Of the query heads that share a key or value head.
        return d_q, d_k.unflatten(1, (heads, -1)).sum(2), d_v.unflatten(1, (heads, -1)).sum(2)


def _flash_takes(q: Tensor, bias: Tensor | None) -> bool:
    """True for a GPU's flash kernel, which takes fewer key and value heads than query heads."""
    fits = q.dtype in _FLASH and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return bias is None and fits and q.device.type != "cpu"


def _repeated(x_BGSK: Tensor, q_BHLK: Tensor) -> Tensor:
    """Return a key or value head for each query head."""
    each = q_BHLK.shape[1] // x_BGSK.shape[1]
    return x_BGSK if each == 1 else x_BGSK.repeat_interleave(each, 1)


def _sent(x: Tensor, by: int, ring: Ring, group: str) -> Tensor:
    """Send x, (2, ...), to the rank `by` places on, and return what comes, which is to be waited
    for. All ranks call it."""
    sends, gets = [0] * ring.size, [0] * ring.size
    sends[(ring.rank + by) % ring.size] = gets[(ring.rank - by) % ring.size] = len(x)
    sent: Tensor = _c10d.all_to_all_single(x.contiguous(), gets, sends, group)
    return sent


def attention(
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGK: Tensor,
    starts: Tensor | None,
    real: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    order: list[int],
    group: str,
) -> tuple[Tensor, Tensor]:
    """Return the outputs (B, L, H, K), and the log of the sums of exponentials (B, H, L) in fp32.

    starts, real (B, S): of whole rows, see Context; slopes (H,): of alibi; order: the fields of a
    Ring; group: the name of the ring's process group.
    """
    ring = Ring(*order)
    q, block = q_BLHK.transpose(1, 2), torch.stack([k_BLGK, v_BLGK]).transpose(2, 3)
    scored = _Block(q, ring, starts, real, slopes, scale)
    length = q.shape[2] // ring.runs
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    log = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    turns = shifts(ring._replace(rank=0), length)
    for at, following in zip(turns, [*turns[1:], None], strict=True):
        arriving = None if following is None else _sent(block, following - at, ring, group)
        for tile in tiles(ring, (ring.rank - at) % ring.size, length, scored.masked):
            part, (k, v) = tile.queries, block[:, :, :, tile.keys]
            new, new_log = scored.forward(q[:, :, part], k, v, tile)
            both = torch.logaddexp(log[:, :, part], new_log)
            before, share = (log[:, :, part] - both).exp(), (new_log - both).exp()
            out[:, :, part] = out[:, :, part] * before[..., None] + new * share[..., None]
            log[:, :, part] = both
        block = block if arriving is None else _c10d.wait_tensor(arriving)
    return out.to(q.dtype).transpose(1, 2).contiguous(), log


def gradients(
    d_out_BLHK: Tensor,
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGK: Tensor,
    out_BLHK: Tensor,
    log_BHL: Tensor,
    starts: Tensor | None,
    real: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    order: list[int],
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; arguments and results of `attention`."""
    ring = Ring(*order)
    d_out, q, out = (x.transpose(1, 2) for x in (d_out_BLHK, q_BLHK, out_BLHK))
    block = torch.stack([k_BLGK, v_BLGK]).transpose(2, 3)
    scored = _Block(q, ring, starts, real, slopes, scale)
    length = q.shape[2] // ring.runs
    d_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    d_block: Tensor | None = None  # on its way beside the keys and values that it is of
    turns = shifts(ring._replace(rank=0), length)
    for at, following in zip(turns, [*turns[1:], None], strict=True):
        arriving = None if following is None else _sent(block, following - at, ring, group)
        d_here = torch.zeros(block.shape, dtype=torch.float32, device=q.device)
        for tile in tiles(ring, (ring.rank - at) % ring.size, length, scored.masked):
            part, keys = tile.queries, tile.keys
            d_q_part, d_k, d_v = scored.backward(
                d_out[:, :, part], q[:, :, part], block[0, :, :, keys], block[1, :, :, keys],
                out[:, :, part], log_BHL[:, :, part], tile,
            )  # fmt: skip
            d_q[:, :, part] += d_q_part
            d_here[0, :, :, keys] += d_k
            d_here[1, :, :, keys] += d_v
        d_block = d_here if d_block is None else _c10d.wait_tensor(d_block).add_(d_here)
        if (onward := -at if following is None else following - at) % ring.size:
            d_block = _sent(d_block, onward, ring, group)
        block = block if arriving is None else _c10d.wait_tensor(arriving)
    assert d_block is not None
    d_block = _c10d.wait_tensor(d_block) if turns[-1] else d_block
    # Each a tensor of its own, as an operation's results must be.
    d_q, d_k, d_v = (
        x.transpose(1, 2).to(q.dtype, copy=True, memory_format=torch.contiguous_format)
        for x in (d_q, *d_block)
    )
    return d_q, d_k, d_v


# Each one operation: a compiler doesn't unroll the ring, and selective checkpointing keeps its
# results alone (models/block.py).
_attention = torch.library.custom_op("forescale::ring", attention, mutates_args=())
_gradients = torch.library.custom_op("forescale::ring_gradients", gradients, mutates_args=())
# What they do, by name, for those who look inside (rehearsal/observer.py).
INSIDE: dict[str, Any] = {"forescale::ring": attention, "forescale::ring_gradients": gradients}


@_attention.register_fake
def _like_attention(q_BLHK: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, L, H, _ = q_BLHK.shape
    log_BHL = q_BLHK.new_empty(B, H, L, dtype=torch.float32)
    return torch.empty_like(q_BLHK, memory_format=torch.contiguous_format), log_BHL


@_gradients.register_fake
def _like_gradients(d_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in rest[:3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, real, slopes, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, starts, real, slopes)


def _backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(d_out.contiguous(), *ctx.saved_tensors, *ctx.rest), *[None] * 6


_attention.register_autograd(_backward, setup_context=_save)


def around(
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGK: Tensor,
    context: Any,
    scale: float,
    order: tuple[bool, int, int],
) -> Tensor:
    """Return the outputs of this rank's queries, (B, L, H, K), by the keys of all ranks of
    context.group.ring that each sees. order: causal, window and global_tokens of the mixer."""
    group: SequenceGroup = context.group
    numbers = [group.ring.rank, group.ring.size, group.runs, *map(int, order)]
    out_BLHK, _ = _attention(
        q_BLHK, k_BLGK, v_BLGK, context.starts, context.real, context.mask, scale, numbers,
        group.ring.name,
    )  # fmt: skip
    return out_BLHK
