"""The rules of a model's config: which values, and which of them together, can be built.

Invariant: what no rule forbids can be built; each broken rule names its field, what is wrong and
what to do. Rules of experts are beside their costs. Imports no torch.
"""

import math
from dataclasses import fields
from typing import TYPE_CHECKING

from forescale.models.costs import MIXERS, MLPS
from forescale.models.costs.moe import problems_of_sizes as problems_of_experts
from forescale.models.costs.record import Problem

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

POSITIONS = ("rotary", "alibi", "learned", "sinusoidal", "none")
ROPE_SCALINGS = ("none", "ntk", "yarn")
NORMS = ("rmsnorm", "layernorm")
NORM_PLACEMENTS = ("pre", "post", "sandwich")
QK_NORM_OVER = ("head", "layer")
ATTENTION_GATES = ("none", "head", "channel")
PARAMETRIZATIONS = ("standard", "mup", "completep")
SPARSE_PATTERNS = ("strided", "fixed", "bigbird")
WINDOW_KEYS = ("window", "global_tokens")
SPARSE_KEYS = ("sparse_pattern", "sparse_block", "sparse_local", "sparse_global", "sparse_random")

HEAD_DIM = 64
MOST_LAYERS = 2048  # of a plan that takes seconds; trained models have some hundred


def problems(
    config: "ModelConfig", vocab_size: int | None, sequence_length: int | None
) -> list[Problem]:
    """Return the broken rules as (field, what, todo); without any, the model can be built.

    Args: `vocab_size` and `sequence_length` of the data, if known; the vocabulary with the ids
    that the objective adds.
    """
    found = _of_values(config) or _of_positions(config)
    found = found or MLPS[config.mlp].problems(config) or _without_experts(config)
    if found:
        return found
    if config.depth is None and (config.num_layers is None or config.width is None):
        return [("depth", "the model has no size", "give depth, or num_layers and width")]
    full = config.sized()
    return (
        _of_heads(config, full)
        + _of_sizes(config, full)
        + _of_patterns(config, sequence_length)
        + _of_data(config, vocab_size, sequence_length)
    )


def _of_heads(config: "ModelConfig", full: "ModelConfig") -> list[Problem]:
    """Return the broken rules of heads and what is as wide as they are. full: config.sized()."""
    found: list[Problem] = []
    width, num_heads, num_kv_heads = full.width, full.num_heads, full.num_kv_heads
    assert width is not None
    assert num_heads is not None
    assert num_kv_heads is not None
    if config.num_heads is None and width % HEAD_DIM:
        found.append(("num_heads", f"{HEAD_DIM} does not divide width {width}", "give num_heads"))
    elif width % num_heads:
        what = f"{num_heads} heads do not divide width {width}"
        found.append(("num_heads", what, "choose a divisor of width"))
    elif full.position == "rotary" and width // num_heads % 2:
        what = f"rotary position needs even heads, not {width // num_heads} wide"
        found.append(("num_heads", what, "choose another num_heads or position"))
    elif full.position == "rotary" and width // num_heads * (full.rope_fraction or 1) % 2:
        what = f"{full.rope_fraction:g} of {width // num_heads} is not an even number"
        found.append(("rope_fraction", what, "choose one that gives an even part of a head"))
    elif full.rope_scaling == "ntk" and width // num_heads < 4:
        found.append(("num_heads", "ntk needs heads of at least 4", "choose fewer heads"))
    if config.halves_rotation and config.rope_fraction == 1:
        what = "mixer latent needs a part of each head that does not rotate"
        found.append(("rope_fraction", what, "give less than 1, or leave it out"))
    if config.has_latent and (config.latent_rank or 0) >= 2 * width:
        what = f"{config.latent_rank} does not compress keys and values, {2 * width} a token"
        found.append(("latent_rank", what, "give less, or leave it out"))
    if num_heads % num_kv_heads:
        what = f"{num_kv_heads} do not divide {num_heads} heads"
        found.append(("num_kv_heads", what, "choose a divisor of num_heads"))
    return found


def _of_sizes(config: "ModelConfig", full: "ModelConfig") -> list[Problem]:
    """Return the broken rules of experts, positions and layers. full: config.sized()."""
    found: list[Problem] = []
    assert full.width is not None
    if config.mlp == "moe":
        found += problems_of_experts(config, full)
    if full.position == "sinusoidal" and full.width % 2:
        found.append(("width", "sinusoidal position needs an even width", "make it even"))
    if len(config.mixer_pattern) > (full.num_layers or 0):
        what = f"{len(config.mixer_pattern)} mixers for {full.num_layers} layers"
        found.append(("mixer_pattern", what, "give at most one a layer"))
    return found


def _of_data(
    config: "ModelConfig", vocab_size: int | None, sequence_length: int | None
) -> list[Problem]:
    """Return the sizes that don't fit the data's."""
    found: list[Problem] = []
    if config.vocab_size and vocab_size and config.vocab_size < vocab_size:
        what = f"{config.vocab_size} is less than the {vocab_size} of tokenizer and objective"
        found.append(("vocab_size", what, "leave it out, or give at least as many"))
    if config.source_length and sequence_length and config.source_length >= sequence_length:
        what = f"{config.source_length} leaves the decoder none of {sequence_length} columns"
        found.append(("source_length", what, "leave it out"))
    longest = config.max_sequence_length
    if longest and sequence_length and longest < sequence_length:
        what = f"{longest} is less than the sequence length {sequence_length}"
        found.append(("max_sequence_length", what, "leave it out, or raise it"))
    return found


def _of_values(config: "ModelConfig") -> list[Problem]:
    found: list[Problem] = []
    sizes = ("depth", "num_layers", "width", "num_heads", "num_kv_heads", "mlp_width")
    bases = ("base_width", "base_depth", "delta_value_dim", "delta_conv")
    ranks = ("latent_rank", "latent_query_rank")
    lengths = ("max_sequence_length", "rope_original_length", "source_length")
    for name in (*sizes, "vocab_size", *lengths, *bases, *ranks):
        value = getattr(config, name)
        if value is not None and value < 1:
            found.append((name, f"{value} is not a size", "give at least 1"))
    for name in ("depth", "num_layers"):
        if (getattr(config, name) or 0) > MOST_LAYERS:
            what = f"{getattr(config, name)} layers are too many"
            found.append((name, what, f"give at most {MOST_LAYERS:,}"))
    choices = [("position", POSITIONS), ("norm", NORMS), ("mixer", tuple(MIXERS))]
    choices += [("mlp", tuple(MLPS)), ("rope_scaling", ROPE_SCALINGS)]
    choices += [("norm_placement", NORM_PLACEMENTS), ("qk_norm_over", QK_NORM_OVER)]
    choices += [("attention_gate", ATTENTION_GATES)]
    choices += [("mixer_pattern", tuple(MIXERS)), ("parametrization", PARAMETRIZATIONS)]
    for name, known in choices:
        given = getattr(config, name)
        for value in given if isinstance(given, list) else [given]:
            if value not in known:
                todo = f"choose from {', '.join(known)}"
                found.append((name, f"unknown value {value!r}", todo))
    for name in ("rope_theta", "norm_eps"):
        if not getattr(config, name) > 0:
            found.append((name, "must be above 0", "give a positive number"))
    for name in ("z_loss", "loss_chunk", "logit_softcap"):
        if not getattr(config, name) >= 0:
            found.append((name, "must not be negative", "give 0 to switch it off"))
    if config.rope_fraction is not None and not 0 < config.rope_fraction <= 1:
        found.append(("rope_fraction", "is not a part of a head", "give above 0 to 1"))
    if not 0 <= config.dropout < 1:
        found.append(("dropout", f"{config.dropout} is not a probability below 1", "give 0 to 1"))
    if config.init_std is not None and not config.init_std > 0:
        found.append(("init_std", "must be above 0", "leave it out for the rule"))
    return found


def _without_experts(config: "ModelConfig") -> list[Problem]:
    """Return the keys moe_* that are set though there are no experts."""
    if config.mlp == "moe":
        return []
    keys = [f for f in fields(config) if f.name.startswith("moe_")]
    given = [key.name for key in keys if getattr(config, key.name) != key.default]
    todo = "leave it out, or choose mlp=moe"
    return [(name, f"has no effect with mlp={config.mlp}", todo) for name in given]


def _of_positions(config: "ModelConfig") -> list[Problem]:
    """Return the broken rules of positions among values that are each allowed."""
    found = _of_encoder(config)
    kind, factor = config.rope_scaling, config.rope_factor
    for mixer in dict.fromkeys(config.mixer_pattern or [config.mixer]):
        if config.position == "alibi" and not MIXERS[mixer].takes_alibi:
            what = f"mixer {mixer} does not add alibi's biases to scores"
            found.append(("position", what, "choose another position"))
        if not config.causal and not MIXERS[mixer].takes_future:
            what = f"mixer {mixer} can't let a token see later ones"
            found.append(("causal", what, "choose another mixer, or leave it out"))
    if config.position == "alibi" and not config.causal:
        todo = "choose another position"
        found.append(("position", "alibi's biases are for causal models", todo))
    if config.rope_fraction not in (None, 1) and config.position != "rotary":
        todo = "leave it out, or choose position=rotary"
        found.append(("rope_fraction", f"{config.position} positions don't rotate", todo))
    if config.scale_embedding and config.position == "sinusoidal":
        what = "sinusoidal positions scale the embedding already"
        found.append(("scale_embedding", what, "leave it out"))
    if kind != "none" and config.position != "rotary":
        what = f"{kind} scales rotary positions, not {config.position}"
        found.append(("rope_scaling", what, "leave it out, or choose position=rotary"))
    elif kind == "none" and factor != 1:
        todo = "choose rope_scaling=ntk or yarn, or leave it out"
        found.append(("rope_factor", "has no effect without rope_scaling", todo))
    elif kind != "none" and not 1 < factor < math.inf:
        what = f"{factor} does not lengthen the context"
        found.append(("rope_factor", what, "give new length / original length, above 1"))
    elif kind == "yarn" and config.rope_theta <= 1:
        found.append(("rope_theta", "yarn needs more than 1", "give more, such as 10000"))
    if kind != "yarn" and config.rope_original_length:
        todo = "leave it out, or choose rope_scaling=yarn"
        found.append(("rope_original_length", "only yarn depends on it", todo))
    return found


def _of_encoder(config: "ModelConfig") -> list[Problem]:
    """Return the broken rules of an encoder-decoder."""
    if not config.encoder_layers:
        if config.source_length:
            return [("source_length", "there is no encoder", "leave it out")]
        return []
    if not 0 < config.encoder_layers <= MOST_LAYERS:
        what = f"{config.encoder_layers} is not a number of layers"
        return [("encoder_layers", what, f"give 0 to {MOST_LAYERS:,}")]
    found: list[Problem] = []
    if not config.causal:
        what = "the decoder of an encoder-decoder sees no later token"
        found.append(("causal", what, "leave it out"))
    if config.position == "alibi":
        todo = "choose another position"
        found.append(("position", "alibi's biases are for causal models", todo))
    if config.mlp == "moe":
        what = "an encoder-decoder has no experts"
        found.append(("mlp", what, "choose another mlp, or leave out encoder_layers"))
    if config.parametrization == "completep":
        what = "completep has a rule for one stack of layers, not for encoder and decoder"
        found.append(("parametrization", what, "choose mup or standard"))
    for mixer in dict.fromkeys(config.mixer_pattern or [config.mixer]):
        if not MIXERS[mixer].takes_future:
            what = f"mixer {mixer} can't let a token of the encoder see later ones"
            found.append(("encoder_layers", what, "choose another mixer"))
    return found


def _of_patterns(c: "ModelConfig", sequence_length: int | None) -> list[Problem]:
    """Return the broken rules of attention to few keys."""
    used = c.mixer_pattern or [c.mixer]
    longest = c.max_sequence_length or sequence_length
    found = _without_pattern(c, used)
    if "window" in used:
        if c.window is None:
            found.append(("window", "mixer window has no width", "give how many tokens one sees"))
        elif c.window < 1:
            found.append(("window", f"{c.window} tokens are no window", "give at least 1"))
        elif longest and c.window > longest:
            what = f"{c.window} tokens are more than the context's {longest}"
            found.append(("window", what, "give fewer, or choose mixer attention"))
        if c.global_tokens < 0:
            found.append(("global_tokens", "must not be negative", "give 0 for none"))
        elif longest and c.global_tokens > longest:
            what = f"{c.global_tokens} tokens are more than the context's {longest}"
            found.append(("global_tokens", what, "give fewer"))
    if "block_sparse" in used:
        found += _of_blocks(c, longest)
    return found


def _without_pattern(c: "ModelConfig", used: list[str]) -> list[Problem]:
    """Return the keys of patterns that are set and have no effect."""
    of_mixer = {"window": WINDOW_KEYS, "block_sparse": SPARSE_KEYS}
    found: list[Problem] = []
    for mixer, names in of_mixer.items():
        for name in names:
            if mixer not in used and getattr(c, name) != getattr(type(c), name):
                what = f"has no effect without mixer {mixer}"
                found.append((name, what, f"leave it out, or choose mixer={mixer}"))
    for name in ("sparse_global", "sparse_random"):
        changed = getattr(c, name) != getattr(type(c), name)
        if changed and "block_sparse" in used and c.sparse_pattern != "bigbird":
            what = f"has no effect on pattern {c.sparse_pattern}"
            found.append((name, what, "leave it out, or choose sparse_pattern=bigbird"))
    return found


def _of_blocks(c: "ModelConfig", longest: int | None) -> list[Problem]:
    """Return the broken rules of block_sparse."""
    if c.sparse_pattern not in SPARSE_PATTERNS:
        what, todo = f"unknown value {c.sparse_pattern!r}", ", ".join(SPARSE_PATTERNS)
        return [("sparse_pattern", what, f"choose from {todo}")]
    if c.sparse_block < 1:
        return [("sparse_block", f"{c.sparse_block} is not a size", "give at least 1")]
    found: list[Problem] = []
    least = 1 if c.sparse_pattern == "bigbird" else 2
    if c.sparse_local < least:
        what = f"{c.sparse_local} is too little for pattern {c.sparse_pattern}"
        found.append(("sparse_local", what, f"give at least {least} blocks"))
    for name in ("sparse_global", "sparse_random"):
        if getattr(c, name) < 0:
            found.append((name, "must not be negative", "give 0 for none"))
    if longest and c.sparse_block * c.sparse_local > longest:
        what = f"{c.sparse_local} blocks of {c.sparse_block} are more than the context's {longest}"
        found.append(("sparse_local", what, "give smaller or fewer blocks, or mixer attention"))
    return found
