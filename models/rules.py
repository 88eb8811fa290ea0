"""The rules of a model's config: which values, and which of them together, can be built.

Invariant: what no rule forbids can be built; each broken rule names its field, what is wrong and
what to do. What only one mixer or MLP reads has its rules beside its costs. Imports no torch.
"""

import math
from typing import TYPE_CHECKING

from forescale.models.costs import CROSS, MIXERS, MLPS
from forescale.models.costs.record import Part, Problem, below_1

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

POSITIONS = ("rotary", "alibi", "relative", "learned", "sinusoidal", "none")
ROPE_SCALINGS = ("none", "ntk", "yarn", "llama3")
NORMS = ("rmsnorm", "layernorm")
NORM_PLACEMENTS = ("pre", "post", "sandwich", "residual")
HEADS = ("linear", "dense")
QK_NORM_OVER = ("head", "layer")
ATTENTION_GATES = ("none", "head", "channel")
CHECKPOINTINGS = ("none", "selective", "full")
PARAMETRIZATIONS = ("standard", "mup", "completep")

HEAD_DIM = 64
MOST_LAYERS = 2048  # of a plan that takes seconds; trained models have some hundred
MOST_MTP = 16  # modules that predict later tokens; published models have 1 to 3


def problems(
    config: "ModelConfig", vocab_size: int | None, sequence_length: int | None
) -> list[Problem]:
    """Return the broken rules as (field, what, todo); without any, the model can be built.

    Args: `vocab_size` and `sequence_length` of the data, if known; the vocabulary with the ids
    that the objective adds.
    """
    if found := of_values(config) or _of_positions(config):
        return found
    if config.depth is None and (config.num_layers is None or config.width is None):
        return [("depth", "the model has no size", "give depth, or num_layers and width")]
    full = config.sized()
    return (
        _of_heads(config, full)
        + _of_sizes(config, full)
        + _of_parts(config, full, config.max_sequence_length or sequence_length)
        + _of_mtp(config, config.max_sequence_length or sequence_length)
        + _of_data(config, vocab_size, sequence_length)
    )


def parts_used(config: "ModelConfig") -> list[Part]:
    """Return the parts that some layer has."""
    parts = [*(MIXERS[name] for name in config.mixers_used), MLPS[config.mlp]]
    return [*parts, CROSS] if config.has_encoder else parts


def _of_heads(config: "ModelConfig", full: "ModelConfig") -> list[Problem]:
    """Return the broken rules of heads and what is as wide as they are. full: config.sized()."""
    found: list[Problem] = []
    if not any("num_heads" in part.reads for part in parts_used(config)):
        return found
    width, num_heads, num_kv_heads = full.width, full.num_heads, full.num_kv_heads
    assert width is not None
    assert num_heads is not None
    assert num_kv_heads is not None
    head_dim, usual = full.head_dim or width // num_heads, config.head_dim or HEAD_DIM
    if config.num_heads is None and width % usual:
        found.append(("num_heads", f"{usual} does not divide width {width}", "give num_heads"))
    elif width % num_heads and not config.head_dim:
        problem = f"{num_heads} heads do not divide width {width}"
        found.append(("num_heads", problem, "choose a divisor of width, or give head_dim"))
    elif full.rotates and head_dim % 2:
        problem, key = f"rotary position needs even heads, not {head_dim} wide", _of_width(full)
        found.append((key, problem, f"choose another {key} or position"))
    elif full.rotates:
        found += _of_rotation(full, head_dim * (full.rope_fraction or 1))
    if num_heads % num_kv_heads:
        problem = f"{num_kv_heads} do not divide {num_heads} heads"
        found.append(("num_kv_heads", problem, "choose a divisor of num_heads"))
    return found


def _of_rotation(full: "ModelConfig", turning: float) -> list[Problem]:
    """Return the broken rules of the width that rotates in each head."""
    even = 2 * round(turning / 2)
    if abs(turning - even) > 1e-6 * turning or not even:  # a fraction of a width is hardly exact
        problem = f"{full.rope_fraction:g} of a head is {turning:g} wide, which is not even"
        return [("rope_fraction", problem, "choose one that gives an even part of a head")]
    if full.rope_scaling == "ntk" and even < 4:
        problem = f"ntk needs at least 4 of a head that rotate, not {even}"
        wider = "choose wider heads" if full.head_dim else "choose fewer heads"
        return [(_of_width(full), problem, f"{wider}, or a larger rope_fraction")]
    return []


def _of_width(config: "ModelConfig") -> str:
    """Return the key that decides how wide a head is."""
    return "head_dim" if config.head_dim else "num_heads"


def _of_sizes(config: "ModelConfig", full: "ModelConfig") -> list[Problem]:
    """Return the broken rules of positions and layers. full: config.sized()."""
    found: list[Problem] = []
    assert full.width is not None
    if full.position == "sinusoidal" and full.width % 2:
        found.append(("width", "sinusoidal position needs an even width", "make it even"))
    if len(config.mixer_pattern) > (full.num_layers or 0):
        problem = f"{len(config.mixer_pattern)} mixers for {full.num_layers} layers"
        found.append(("mixer_pattern", problem, "give at most one a layer"))
    return found


def _of_data(
    config: "ModelConfig", vocab_size: int | None, sequence_length: int | None
) -> list[Problem]:
    """Return the sizes that don't fit the data's."""
    found: list[Problem] = []
    if config.vocab_size and vocab_size and config.vocab_size < vocab_size:
        problem = f"{config.vocab_size} is less than the {vocab_size} of tokenizer and objective"
        found.append(("vocab_size", problem, "leave it out, or give at least as many"))
    longest = config.max_sequence_length
    columns = sequence_length or longest
    if config.source_length and columns and config.source_length >= columns:
        problem = f"{config.source_length} leaves the decoder none of {columns} columns"
        found.append(("source_length", problem, "leave it out"))
    if longest and sequence_length and longest < sequence_length:
        problem = f"{longest} is less than the sequence length {sequence_length}"
        found.append(("max_sequence_length", problem, "leave it out, or raise it"))
    return found


def of_values(config: "ModelConfig") -> list[Problem]:
    """Return the broken rules of single values."""
    found: list[Problem] = []
    sizes = ("depth", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
    bases = ("base_width", "base_depth")
    lengths = ("max_sequence_length", "rope_original_length", "source_length")
    found += below_1(config, *sizes, "vocab_size", "mlp_chunk", *lengths, *bases)
    for name in ("depth", "num_layers"):
        if (getattr(config, name) or 0) > MOST_LAYERS:
            problem = f"{getattr(config, name)} layers are too many"
            found.append((name, problem, f"give at most {MOST_LAYERS:,}"))
    choices = [("position", POSITIONS), ("norm", NORMS), ("mixer", tuple(MIXERS))]
    choices += [("mlp", tuple(MLPS)), ("rope_scaling", ROPE_SCALINGS)]
    choices += [("norm_placement", NORM_PLACEMENTS), ("qk_norm_over", QK_NORM_OVER)]
    choices += [("attention_gate", ATTENTION_GATES), ("head", HEADS)]
    choices += [("mixer_pattern", tuple(MIXERS)), ("parametrization", PARAMETRIZATIONS)]
    choices += [("activation_checkpointing", CHECKPOINTINGS)]
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
        if not 0 <= (getattr(config, name) or 0) < math.inf:
            found.append((name, "must be a number, not negative", "give 0 to switch it off"))
    if config.mlp_chunk is not None and config.activation_checkpointing == "selective":
        problem = "an MLP in chunks makes its products again, which selective checkpointing keeps"
        found.append(("mlp_chunk", problem, "leave it out, or give activation_checkpointing=full"))
    if config.rope_fraction is not None and not 0 < config.rope_fraction <= 1:
        found.append(("rope_fraction", "is not a part of a head", "give above 0 to 1"))
    if not 0 <= config.dropout < 1:
        found.append(
            ("dropout", f"{config.dropout} is not a probability below 1", "give 0 or more, below 1")
        )
    if config.init_std is not None and not 0 < config.init_std < math.inf:
        found.append(("init_std", "must be above 0", "leave it out for the rule"))
    return found


def _of_parts(config: "ModelConfig", full: "ModelConfig", longest: int | None) -> list[Problem]:
    """Return the broken rules of mixers and MLP, each of its own keys, and the keys that are given
    though no part of the model reads them. full: config.sized(); longest: sequence, if known."""
    parts = parts_used(config)
    found = [problem for part in parts for problem in part.problems(config, full, longest)]
    read = {key for part in parts for key in part.keys}
    for kind, table in (("mixer", MIXERS), ("mlp", MLPS)):
        for name, part in table.items():
            for key in part.keys:
                if key not in read and getattr(config, key) != getattr(type(config), key):
                    problem = f"has no effect without {kind} {name}"
                    found.append((key, problem, f"leave it out, or choose {kind}={name}"))
                    read.add(key)  # others read it too: one is named
    return found


def _of_positions(config: "ModelConfig") -> list[Problem]:
    """Return the broken rules of positions among values that are each allowed."""
    found = _of_encoder(config)
    if config.parametrization == "completep" and not config.norms_stream:
        problem = "completep has no rule for a stream that is normed after each part"
        found.append(
            ("norm_placement", problem, "choose another, or parametrization=mup or standard")
        )
    kind, factor = config.rope_scaling, config.rope_factor
    # The key by which tokens see later ones, if they do.
    sees_all = "encoder_layers" if config.has_encoder else "" if config.causal else "causal"
    for mixer in config.mixers_used:
        if config.position in ("alibi", "relative") and not MIXERS[mixer].takes_biases:
            problem = f"mixer {mixer} does not add the biases of {config.position} to scores"
            found.append(("position", problem, "choose another position"))
        if sees_all and not MIXERS[mixer].takes_future:
            problem = f"mixer {mixer} can't let a token of an encoder see later ones"
            found.append((sees_all, problem, "choose another mixer, or leave it out"))
    if config.position == "alibi" and sees_all:
        todo = "choose another position"
        found.append(("position", "alibi's biases are for causal models", todo))
    found += _of_relative(config)
    if config.rope_fraction not in (None, 1) and config.position != "rotary":
        todo = "leave it out, or choose position=rotary"
        found.append(("rope_fraction", f"{config.position} positions don't rotate", todo))
    if config.scale_embedding and config.position == "sinusoidal":
        problem = "sinusoidal positions scale the embedding already"
        found.append(("scale_embedding", problem, "leave it out"))
    if config.value_residual:
        found += _of_value_residual(config)
    found += _of_tokens(config)
    if kind != "none" and config.position != "rotary":
        problem = f"{kind} scales rotary positions, not {config.position}"
        found.append(("rope_scaling", problem, "leave it out, or choose position=rotary"))
    elif kind == "none" and factor != 1:
        todo = "choose rope_scaling=ntk, yarn or llama3, or leave it out"
        found.append(("rope_factor", "has no effect without rope_scaling", todo))
    elif kind != "none" and not 1 < factor < math.inf:
        problem = f"{factor} does not lengthen the context"
        found.append(("rope_factor", problem, "give new length / original length, above 1"))
    elif kind == "yarn" and config.rope_theta <= 1:
        found.append(("rope_theta", "yarn needs more than 1", "give more, such as 10000"))
    if kind not in ("yarn", "llama3") and config.rope_original_length:
        todo = "leave it out, or choose rope_scaling=yarn or llama3"
        found.append(("rope_original_length", "only yarn and llama3 depend on it", todo))
    return found


def _of_relative(config: "ModelConfig") -> list[Problem]:
    """Return the broken rules of relative positions, and their keys where there are none."""
    names = ("relative_buckets", "relative_distance")
    if config.position != "relative":
        given = [name for name in names if getattr(config, name) != getattr(type(config), name)]
        todo = "leave it out, or choose position=relative"
        return [(name, "has no effect without relative positions", todo) for name in given]
    sees_all = config.has_encoder or not config.causal
    count, least = config.relative_buckets, 4 if sees_all else 2
    if count < least or count % least:
        problem = f"{count} entries can't be halved into near and far"
        problem += ", before and behind" if sees_all else ""
        return [("relative_buckets", problem, f"give a multiple of {least}")]
    if config.relative_distance <= count // 2:
        problem = f"{config.relative_distance} leaves no far distances for half of {count} entries"
        return [("relative_distance", problem, f"give more than {count // 2}")]
    return []


def _of_value_residual(config: "ModelConfig") -> list[Problem]:
    """Return the broken rules of a mixture of the first layer's values into those of others."""
    if not 0 < config.value_residual < 1:
        problem = f"{config.value_residual} is no part of a layer's values"
        return [("value_residual", problem, "give above 0 and below 1, or 0 for none")]
    if config.encoder_layers:
        problem = "an encoder and a decoder have no first layer in common"
        return [("value_residual", problem, "leave it out, or leave out encoder_layers")]
    if (config.num_layers or config.depth) == 1:
        problem = "the only layer has no earlier one, whose values it could take"
        return [("value_residual", problem, "leave it out, or give more layers")]
    return _without_values(config, "value_residual")


def _without_values(config: "ModelConfig", field: str) -> list[Problem]:
    """Return the problem of a field that needs values of attention in all layers, where some, but
    not all, have none."""
    others = [name for name in config.mixers_used if not MIXERS[name].takes_values]
    if not 0 < len(others) < len(config.mixers_used):
        return []
    problem = f"mixer {others[0]} has no values of attention, and all layers need them"
    return [(field, problem, "leave it out, or choose other mixers")]


def _of_tokens(config: "ModelConfig") -> list[Problem]:
    """Return the broken rules of what else is learned of a token and the one before it."""
    found: list[Problem] = []
    for name in ("bigram_rows", "value_embedding", "token_shift"):
        if (given := getattr(config, name)) < 0:
            found.append((name, f"{given} must not be negative", "give 0 for none"))
        elif given and config.encoder_layers:
            problem = "is for a decoder or an encoder alone"
            found.append((name, problem, "leave it out, or leave out encoder_layers"))
    if not config.value_embedding or found:
        return found
    if config.mtp_layers:
        problem = "the modules for later tokens have no value embedding"
        found.append(("value_embedding", problem, "leave it out, or leave out mtp_layers"))
    return found + _without_values(config, "value_embedding")


def _of_mtp(config: "ModelConfig", longest: int | None) -> list[Problem]:
    """Return the broken rules of modules that predict later tokens."""
    count, field = config.mtp_layers, "mtp_layers"
    if not count:
        problem, todo = "has no effect without mtp_layers", "leave it out, or give mtp_layers=1"
        is_given = config.mtp_weight != type(config).mtp_weight
        return [("mtp_weight", problem, todo)] if is_given else []
    if not 0 < count <= MOST_MTP:
        return [(field, f"{count} is not a number of modules", f"give 0 to {MOST_MTP}")]
    if not 0 < config.mtp_weight < math.inf:
        todo = "give a number above 0, or mtp_layers=0"
        return [("mtp_weight", f"{config.mtp_weight} gives them no part in the objective", todo)]
    if longest and count >= longest:
        problem = f"in {longest} columns no token is {count + 1} later than another"
        return [(field, problem, f"give at most {longest - 1}")]
    if config.has_encoder or not config.causal:
        problem = "later tokens are predicted by a causal decoder alone"
        other = "encoder_layers" if config.has_encoder else "causal"
        return [(field, problem, f"leave it out, or leave out {other}")]
    if config.value_residual:
        problem = "the modules' blocks have no values of the first layer"
        return [(field, problem, "leave it out, or leave out value_residual")]
    return []


def _of_encoder(config: "ModelConfig") -> list[Problem]:
    """Return the broken rules of an encoder-decoder."""
    if not config.encoder_layers:
        if config.source_length:
            return [("source_length", "there is no encoder", "leave it out")]
        return []
    if not 0 < config.encoder_layers <= MOST_LAYERS:
        problem = f"{config.encoder_layers} is not a number of layers"
        return [("encoder_layers", problem, f"give 0 to {MOST_LAYERS:,}")]
    found: list[Problem] = []
    if not config.causal:
        problem = "the decoder of an encoder-decoder sees no later token"
        found.append(("causal", problem, "leave it out"))
    if config.has_experts:
        problem = "an encoder-decoder has no experts"
        found.append(("mlp", problem, "choose another mlp, or leave out encoder_layers"))
    if config.parametrization == "completep":
        problem = "completep has a rule for one stack of layers, not for encoder and decoder"
        found.append(("parametrization", problem, "choose mup or standard"))
    return found
