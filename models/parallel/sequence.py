"""Rows whose columns are divided among ranks (Ulysses: Jacobs et al. 2023, arXiv 2309.14509).

A rank holds L/n of a row's L columns in all that acts on a token alone: embedding, norms, MLPs,
head and loss. Around attention the ranks exchange columns for heads: each then has all L columns of
H/n heads, and attends as one rank would. Invariant: the exchange is exact, in the backward pass
too, so that the gradients of a parameter, summed over ranks, are those of one rank.
"""

from collections.abc import Callable

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from forescale.models.parallel.group import Group
from forescale.models.part import copies


class SequenceGroup(Group):
    """The ranks that divide a row."""

    def columns(self, x: Tensor) -> Tensor:
        """Return this rank's columns of rows: (..., L) -> (..., L/n)."""
        return x.chunk(self.size, -1)[self.rank]

    def attended(
        self,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        q_BLHK: Tensor,
        k_BLGK: Tensor,
        v_BLGK: Tensor,
    ) -> Tensor:
        """Return attend(q, k, v) of this rank's columns, (B, L/n, H, K); `attend` is given all
        columns of this rank's heads. Two collectives of the group, which all its ranks call.

        Where ranks are more than key and value heads, each of these goes to several ranks.
        """
        heads, kv_heads = q_BLHK.shape[2], k_BLGK.shape[2]
        each = copies(heads, kv_heads, self.size)
        parts = [q_BLHK, *(x.repeat_interleave(each, 2) for x in (k_BLGK, v_BLGK))]
        # One exchange of all three: each rank's heads of the queries, of the keys, of the values.
        n = self.size
        sent_BLNHK = torch.cat([x.unflatten(2, (n, -1)) for x in parts], 3)
        got_NBLHK = self._exchanged(sent_BLNHK.movedim(2, 0))  # of each rank, its columns
        whole_BLHK = got_NBLHK.movedim(0, 1).flatten(1, 2)
        queries, keys = heads // n, kv_heads * each // n
        y_BLHK = attend(*whole_BLHK.split([queries, keys, keys], 2))
        back_NBLHK = self._exchanged(y_BLHK.unflatten(1, (n, -1)).movedim(1, 0))
        return back_NBLHK.movedim(0, 2).flatten(2, 3)  # of each rank, its heads

    def _exchanged(self, x_N: Tensor) -> Tensor:
        """Send the i-th of n parts to the i-th rank; return what the ranks sent, in their order."""
        received = collectives.all_to_all_single(x_N.contiguous(), None, None, self.name)  # type: ignore[arg-type]
        return collectives.wait_tensor(received)
