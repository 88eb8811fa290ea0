"""The work of a GPU in a micro-batch, and the seconds that it takes: products, attention, traffic.

A roofline with three roofs, none of which hides another:
- Matrix products reach `machine.efficiency` of the peak, which is twice as high in fp8. Where so
  few tokens meet the weights that reading them takes longer, the memory sets their time.
- Attention reaches `machine.attention_efficiency` of the peak, for the scores that a causal kernel
  computes: half the square, in the forward pass once and in the backward pass 2.5 times, for it
  makes the scores again (Dao et al. 2022, arXiv 2205.14135). Short sequences reach less: a kernel
  computes whole blocks on the diagonal.
- All else (norms, activation functions, residuals, casts, the loss) is bound by
  `machine.memory_bandwidth`. Its traffic is a multiple of the bytes that autograd keeps: each is
  written once, read again, and passes some more times where kernels are not fused. Scales for each
  row of fp8 take passes of their own.
And a floor: a micro-batch takes the time in which a host launches its kernels.

The multiples and the efficiencies of conf/machine/h100-sxm and a100-80g are fitted to 102
published speeds, and judged by 268 others (README.md; `python tests/benchmarks/run.py plan`).
Invariant: imports no torch; a model that is a class of the user's own has no Work.
"""

from dataclasses import dataclass, replace
from math import prod

from forescale.config.mesh import Mesh
from forescale.config.train import TrainJob
from forescale.models.config import ModelConfig
from forescale.models.flops import (
    columns_of,
    divided,
    flops_per_token,
    kinds,
    layers_of,
    matrices,
    shapes,
    stacked,
)
from forescale.models.fp8 import fp8_matrices
from forescale.models.memory import activations
from forescale.models.part import matrix_flops
from forescale.plan.bytes.zero import BYTES
from forescale.plan.config import MachineConfig

# Bytes of traffic per kept byte of blocks and of the loss: each operation a kernel of its own, and
# with torch.compile, which fuses neighbours (the loss: written once, read once).
_EAGER, _COMPILED = (24.0, 10.0), (6.4, 2.0)
_ROWWISE = 18  # bytes of traffic per value that fp8 multiplies, with a scale for each row
# Kernels of a block, forward and backward, at least: the first as a rehearsal counts them, of the
# second 20 products and kernels of attention.
_EAGER_KERNELS, _COMPILED_KERNELS = 70, 30
_BACKWARD_SCORES = 2.5  # FLOPs of attention's backward pass, per FLOP of its forward pass
# How much longer that pass takes if it adds in one order (train.deterministic on a GPU). A guess:
# FlashAttention-3 needs 1.21 times as long in its best order (8,192 tokens on an H100: pull request
# 1893 of flash-attention), and up to 1.61 times (DASH, arXiv 2601.21824: 37.9 % of the speed); no
# number of FlashAttention-2, which torch takes, was at hand.
ONE_ORDER = 1.4
_HALF_SPEED = 500  # tokens at which attention has half its speed (FlashAttention-3's figures 5, 6:
# FlashAttention-2 on H100, from 191 TFLOP/s at 512 tokens to 335 at 16k; arXiv 2407.08608)


@dataclass(frozen=True)
class Work:
    """The work of a rank in a micro-batch, forward and backward, recomputation included.

    products, scores: FLOPs of matrix products and of attention. length: tokens of a sequence, on
    which attention's speed depends. traffic: bytes of all else. weights: bytes of the weights that
    products read or write. fp8: FLOPs of those products that are in fp8. kernels: their number.
    ordered: FLOPs of attention in which a GPU must add in one order.
    """

    products: float
    scores: float
    length: int
    traffic: float
    weights: float
    fp8: float
    kernels: int
    ordered: float = 0.0

    def seconds(self, machine: MachineConfig, peak: float) -> float:
        """Return the seconds on a GPU of `peak` FLOP/s."""
        return sum(self.parts(machine, peak).values())

    def parts(self, machine: MachineConfig, peak: float) -> dict[str, float]:
        """Return the seconds of products, attention, its additions in one order and the rest, and
        for which the GPU waits for launches; the last two take none where the machine's memory
        bandwidth is not known."""
        speed = peak * (machine.attention_efficiency or machine.efficiency)
        short = 1 + _HALF_SPEED / self.length
        attending = self.scores / speed * short
        order = {"attention in one order": (ONE_ORDER - 1) * self.ordered / speed * short}
        order = order if self.ordered else {}
        multiplying = (self.products - self.fp8 / 2) / (peak * machine.efficiency)
        if (bandwidth := machine.memory_bandwidth) is None:
            return {"products": multiplying, "attention": attending, **order}
        multiplying, rest = max(multiplying, self.weights / bandwidth), self.traffic / bandwidth
        parts = {"products": multiplying, "attention": attending, **order, "rest": rest}
        waiting = max(0.0, self.kernels * machine.launch - sum(parts.values()))
        return parts | ({"waiting for launches": waiting} if waiting else {})


def work_of(job: TrainJob, parameters: int, mesh: Mesh) -> Work | None:
    """Return the work of one rank in a micro-batch; None for a class of the user's own.

    parameters: those of the rank. If ranks share a micro-batch, each does its part of the columns
    and of the divided matrices, and all of the rest: with divided columns it reads all weights,
    with divided matrices it has the whole residual stream and its norms.
    """
    config = job.model
    if not isinstance(config, ModelConfig):
        return None
    length, micro = job.train.sequence_length, job.rows_at_once
    tokens, size = micro * length, BYTES[job.precision.kind]
    how = config.activation_checkpointing
    # Selective checkpointing makes attention again only with dropout, and all that is cheap.
    again = how == "full" or (how == "selective" and config.dropout > 0)
    forward = flops_per_token(config, length, causal=True) / 3
    scores = _scores(config, length)
    # Of frozen matrices less than three times the forward pass.
    multiplied = job.lora.flops_per_token(config, length, causal=True) - 3 * scores
    # What is computed again, with attention's square as MFU counts it, less that square.
    squares = again * _scores(config, length, causal=False)
    repeated = max(0.0, job.lora.flops_recomputed(config, length, mesh.sequence) - squares)
    part = _part(config, mesh.tensor, length, forward - scores) / mesh.columns
    whole = activations(
        replace(config, activation_checkpointing="none"),
        micro,
        length // mesh.context,
        size,
        masked=job.data.document_mask or not job.objective.continues_text,
        ranks=mesh.sequence,
        tensor=mesh.tensor,
    )
    rows = config.sizes.vocab_size
    rows = rows if rows % mesh.tensor else rows // mesh.tensor
    logits = tokens // mesh.columns * rows * (1 + config.mtp_layers) * (2 * size + 4)
    eager = job.train.compile == "off"
    of_blocks, of_loss = _EAGER if eager else _COMPILED
    # The forward pass makes a third of the traffic, as of the FLOPs.
    passes = 1 + (how != "none") / 3
    traffic = of_blocks * whole.layers * passes + of_loss * logits
    fast = 0.0  # multiplications of fp8 in the forward pass
    if job.precision.fp8 != "none":
        for name, shape in fp8_matrices(config, mesh.tensor).items():
            columns = columns_of(config, int(name.split(".")[1]), length) // mesh.columns
            fast += micro * columns * prod(shape)
            if job.precision.fp8 == "rowwise":
                traffic += _ROWWISE * micro * columns * sum(shape) * passes
    blocks = config.num_blocks + config.mtp_layers
    attended = tokens * scores / mesh.near
    return Work(
        products=tokens * (multiplied + repeated) * part,
        scores=attended * (1 + _BACKWARD_SCORES + again),
        length=length // mesh.context,  # the keys of a kernel's call
        traffic=traffic,
        weights=(3 + again) * size * parameters,
        fp8=2 * fast * (3 + (how == "full")),
        kernels=blocks * (_EAGER_KERNELS if eager else _COMPILED_KERNELS),
        ordered=attended * _BACKWARD_SCORES * (job.train.deterministic and job.on_gpu),
    )


def _part(config: ModelConfig, tensor: int, length: int, products: float) -> float:
    """Return the part of a token's forward `products` that one of the ranks computes that divide
    matrices. It computes all products with undivided matrices, such as a head whose rows are not
    divided. With routers and experts each rank computes those of its own tokens."""
    if tensor == 1:
        return 1.0
    cut, sizes, s = divided(config, tensor), shapes(config), config.sizes
    others = matrices(config) - stacked(config) - cut.keys()
    whole: float = 2 * sum(prod(sizes[name]) for name in others)
    if "embedding.weight" not in cut:
        share = columns_of(config, config.encoder_layers, length) / length
        whole += 2 * s.width * s.vocab_size * share * (1 + config.mtp_layers)
    return (whole + (products - whole) / tensor) / products


def _scores(config: ModelConfig, length: int, causal: bool = True) -> float:
    """Return the forward FLOPs of a token that mixers need beside their matrices, on average over
    the columns of a row."""
    layers, total = layers_of(config), 0.0
    # The blocks of modules for later tokens are as the last one.
    for i, n in [*kinds(config), (len(layers) - 1, config.mtp_layers)]:
        parts, block, columns = layers[i], config.of_block(i), columns_of(config, i, length)
        source = columns_of(config, 0, length)
        for name, keys in (("mixer", columns), ("cross", source)):
            if part := getattr(parts, name):
                matrices = matrix_flops(part.shapes(block))
                matrices -= part.source_flops(block) if name == "cross" else 0
                total += n * max(0, part.flops(block, keys, causal) - matrices) * columns / length
    return total
