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


def of_columns(config: "ModelConfig", ranks: int, columns: int, tensor: int = 1) -> list[Refusal]:
    """Return why `ranks` can't divide rows of `columns` of this model; each (problem, todo).

    tensor: the ranks that divide the heads before.
    """
    whole = "write engine.sequence_parallel=1"
    problems: list[Refusal] = []
    if columns % ranks:
        problem = f"{ranks} ranks don't divide train.sequence_length={columns}"
        problems.append((problem, "choose a divisor of it"))
    if (heads := (config.sized().num_heads or 1) // tensor) % ranks:
        whose = "the model's" if tensor == 1 else "a tensor-parallel rank's"
        problem = f"{ranks} ranks don't divide {whose} {heads} head{'s' * (heads != 1)}"
        times = "" if tensor == 1 else "; its product with engine.tensor_parallel must divide them"
        problems.append((problem, f"choose a divisor of model.num_heads{times}"))
    for mixer in config.mixers_used:
        if not mixer.splits_columns:
            problem = (
                f"mixer {mixer.kind} carries a state from column to column, which no rank has whole"
            )
            problems.append((problem, f"{whole}, or choose a mixer of attention"))
    if any(mixer.shifts for mixer in config.mixers_used):
        problem = "the token before a rank's first column is another rank's"
        problems.append((problem, f"{whole}, or model.mixer.token_shift=false"))
    if config.has_encoder:
        problem = "an encoder-decoder has rows of two parts, which are not divided"
        problems.append((problem, f"{whole}, or model.encoder_layers=0"))
    if config.mtp_layers:
        problem = "modules for later tokens read the next rank's columns"
        problems.append((problem, f"{whole}, or model.mtp_layers=0"))
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
