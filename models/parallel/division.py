"""What a model must be like for ranks to divide the columns of its rows or its matrices.

Invariant: what no rule here forbids computes the same as on one rank. Imports no torch: a plan
reads this file on a login node.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from forescale.models.flops import layers_of

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

Refusal = tuple[str, str]  # the problem, what to do


def pieces(sequence: int, context: int) -> int:
    """Return how many equal parts of successive columns a row must have: two for each rank of a
    ring, so that questions of an evaluation fit each model (runs)."""
    return sequence * context * (2 if context > 1 else 1)


def runs(config: "ModelConfig", context: int) -> int:
    """Return how many runs of successive columns each rank has: 2 where a ring of ranks shares
    causal attention to all tokens equally, 1 where a state goes from rank to rank, or where windows
    see neighbours alone."""
    mixers = config.mixers_used
    passes_state = any(mixer.passes_state for mixer in mixers)
    sees_all = any(mixer.splits_columns and mixer.takes_future for mixer in mixers)
    return 2 if context > 1 and config.causal and sees_all and not passes_state else 1


def of_columns(
    config: "ModelConfig", columns: int, sequence: int = 1, context: int = 1, tensor: int = 1
) -> list[Refusal]:
    """Return why ranks can't divide rows of `columns` of this model; each (problem, todo).

    sequence: ranks that exchange heads; context: those of a ring; tensor: those that divide the
    heads before.
    """
    axes = {"sequence": sequence, "context": context}
    whole = " and ".join(f"engine.{axis}_parallel=1" for axis, size in axes.items() if size > 1)
    whole = f"write {whole}"
    problems: list[Refusal] = []
    if columns % (parts := pieces(sequence, context)):
        ranks = sequence * context
        each = f"{ranks} ranks" if parts == ranks else f"two parts for each of {ranks} ranks"
        problem = f"{each} don't divide train.sequence_length={columns}"
        problems.append((problem, f"choose a multiple of {parts}, or fewer ranks"))
    mixers = config.mixers_used
    heads = (config.sized().num_heads or 1) // tensor
    if heads % sequence and any(mixer.splits_columns for mixer in mixers):
        whose = "the model's" if tensor == 1 else "a tensor-parallel rank's"
        problem = f"{sequence} ranks don't divide {whose} {heads} head{'s' * (heads != 1)}"
        times = "" if tensor == 1 else "; its product with engine.tensor_parallel must divide them"
        todo = f"choose a divisor of model.num_heads{times}, or engine.context_parallel"
        problems.append((problem, todo))
    for mixer in mixers:
        if not (mixer.splits_columns or mixer.passes_state):
            problem = f"mixer {mixer.kind} doesn't know that other ranks have columns of its rows"
            problems.append((problem, f"{whole}, or choose another mixer"))
    if context > 1 and config.dropout:
        problem = "attention in a ring of ranks drops no weights"
        problems.append((problem, "write model.dropout=0, or engine.context_parallel=1"))
    if context > 1 and config.position.kind == "relative":
        problem = "relative positions have biases with a gradient, which a ring of ranks lacks"
        problems.append((problem, "choose another model.position, or engine.context_parallel=1"))
    if config.has_encoder:
        problem = "an encoder-decoder has rows of two parts, which are not divided"
        problems.append((problem, f"{whole}, or model.encoder_layers=0"))
    if config.experts is not None and config.experts.capacity:
        problem = (
            "the places of experts are given to tokens in their order, which no rank has whole"
        )
        problems.append((problem, f"{whole}, or model.mlp.capacity=0"))
    return problems


def of_stages(config: "ModelConfig", stages: int, chunks: int) -> list[Refusal]:
    """Return why `stages` of a pipeline can't divide this model in `chunks` parts each."""
    if config.has_encoder:
        todo = "write engine.pipeline_parallel=1"
        return [("the encoder's output, which all decoder layers read, passes no stages", todo)]
    if (blocks := config.sized().num_layers or 1) < stages * chunks:
        parts = f"{stages} stages" if chunks == 1 else f"{stages} stages of {chunks} parts"
        problem = f"the model's {blocks} layers don't fill {parts}"
        return [(problem, "choose fewer stages, fewer engine.pipeline_chunks, or more layers")]
    return []


def of_matrices(config: "ModelConfig", ranks: int, columns: int) -> list[Refusal]:
    """Return why `ranks` can't divide the matrices of this model; each (problem, todo)."""
    whole, sized = "write engine.tensor_parallel=1", config.sized()
    if config.has_encoder and config.source_length is None:  # that of the data divides nothing
        config = replace(config, source_length=1)
    known = config.resolved(config.vocab_size or 1, columns)
    problems: list[Refusal] = []
    grouped, experts = sized.num_kv_heads != sized.num_heads, known.experts
    is_dense = experts is None or experts.dense_layers > 0
    for name in ("num_heads", *["num_kv_heads"] * grouped, *["mlp_width"] * is_dense):
        if (size := getattr(sized, name) or 1) % ranks:
            problem = f"{ranks} ranks don't divide model.{name}={size}"
            problems.append((problem, f"choose a divisor of model.{name}"))
    layers = layers_of(known)
    mixers = dict.fromkeys(part for parts in layers for part in (parts.mixer, parts.cross) if part)
    for mixer in mixers:
        if not mixer.divided(known):
            over = " with qk_norm=layer" if mixer.heads else ""
            problem = f"the matrices of mixer {mixer.kind}{over} are not divided"
            problems.append((problem, f"{whole}, or choose another mixer"))
    if experts is not None:
        if (inner := experts.shared * experts.width(known)) % ranks:
            problem = f"{ranks} ranks don't divide the {inner} channels of shared experts"
            problems.append((problem, "choose a divisor of model.mlp.shared x expert_width"))
        if experts.capacity:
            problem = "the places of experts are given to tokens in their order, of which each rank"
            problems.append((f"{problem} has a part", f"{whole}, or model.mlp.capacity=0"))
    elif not known.mlp.divided(known):
        problem = f"the matrices of mlp {known.mlp.kind} are not divided"
        problems.append((problem, f"{whole}, or choose another model.mlp"))
    return problems
