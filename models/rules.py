"""The rules of a model's config that concern several of its parts.

Invariant: what no rule forbids can be built; each broken rule names its field, the problem and what
to do. The rules of one part are its methods (part.py). A key that no part reads is a problem only
where a command sets it: presets and frozen configs may hold it. Imports no torch.
"""

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from forescale.models.mixers.attention import cross_of
from forescale.models.part import BlockPart, Part, Problem, below_1, prefixed, unknown_choices
from forescale.models.positions.kinds import Rotary

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

HEAD_DIM = 64
MOST_LAYERS = 2048  # of a plan that takes seconds; trained models have some hundred
MOST_MTP = 16  # modules that predict later tokens; published models have 1 to 3


def problems(
    config: "ModelConfig", vocab_size: int | None, sequence_length: int | None
) -> list[Problem]:
    """Return the broken rules; the arguments are those of ModelConfig.problems."""
    if problems := _of_values(config) or _of_parts(config):
        return problems
    if config.depth is None and (config.num_layers is None or config.width is None):
        return [("depth", "the model has no size", "give depth, or num_layers and width")]
    sized, longest = config.sized(), config.max_sequence_length or sequence_length
    sizes: list[Problem] = []
    if sized.position.kind == "sinusoidal" and (sized.width or 0) % 2:
        sizes.append(("width", "sinusoidal position needs an even width", "make it even"))
    if len(config.mixer_pattern) > (sized.num_layers or 0):
        problem = f"{len(config.mixer_pattern)} mixers for {sized.num_layers} layers"
        sizes.append(("mixer_pattern", problem, "give at most one a layer"))
    within = (
        prefixed(field, part.problems_in(sized, longest)) for field, part in _parts(config).items()
    )
    return (
        _of_heads(config, sized)
        + sizes
        + [problem for each in within for problem in each]
        + _of_mtp(config, longest)
        + _of_data(config, vocab_size, sequence_length)
    )


def unread(config: "ModelConfig") -> list[Problem]:
    """Return the keys that no part of this model reads."""
    problems: list[Problem] = []
    if config.num_layers and config.width and config.depth:
        problem = "has no effect beside num_layers and width, which are set"
        problems.append(("depth", problem, "set these instead, or choose model=depth"))
    if config.mixer_pattern and config.mixer not in config.mixer_pattern:
        problems.append(("mixer", "has no effect beside mixer_pattern", "leave one of them out"))
    read = {name for part in _blocks(config) for name in part.reads}
    if config.position.kind in ("learned", "sinusoidal", "none"):
        read.add("position")  # added to the embedding, or absent
    words = " and ".join(mixer.kind for mixer in config.mixers_used)
    other = "put attention into mixer_pattern" if config.mixer_pattern else "choose mixer=attention"
    for name in ("num_heads", "num_kv_heads", "head_dim", "position"):
        if name not in read and getattr(config, name) is not None:
            problem = f"has no effect with mixer {words}"
            problems.append((name, problem, f"leave it out, or {other}"))
    return problems


def _parts(config: "ModelConfig") -> dict[str, Part]:
    """Return the chosen parts by their fields."""
    parts: dict[str, Part] = {}
    for f in fields(config):
        if "kinds" not in f.metadata or (f.name == "mixer" and config.mixer_pattern):
            continue
        value: Any = getattr(config, f.name)
        if isinstance(value, list):
            parts |= {f"{f.name}.{i}": part for i, part in enumerate(value)}
        else:
            parts[f.name] = value
    return parts


def _blocks(config: "ModelConfig") -> list[BlockPart]:
    """Return the parts that some block has."""
    parts = [*config.mixers_used, config.mlp]
    return [*parts, *map(cross_of, config.mixers_used)] if config.has_encoder else parts


def _of_values(config: "ModelConfig") -> list[Problem]:
    """Return the broken rules of single values."""
    sizes = ("depth", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
    lengths = ("vocab_size", "max_sequence_length", "source_length")
    problems = below_1(config, *sizes, *lengths) + unknown_choices(config)
    for name in ("depth", "num_layers"):
        if (getattr(config, name) or 0) > MOST_LAYERS:
            problem = f"{getattr(config, name)} layers are too many"
            problems.append((name, problem, f"give at most {MOST_LAYERS:,}"))
    for name in ("z_loss", "loss_chunk"):
        if not 0 <= (getattr(config, name) or 0) < math.inf:
            problem = "must be a number, not negative"
            problems.append((name, problem, "give 0 to switch it off"))
    if not 0 <= config.dropout < 1:
        problem = f"{config.dropout} is not a probability below 1"
        problems.append(("dropout", problem, "give 0 or more, below 1"))
    if config.init_std is not None and not 0 < config.init_std < math.inf:
        problems.append(("init_std", "must be above 0", "leave it out for the rule"))
    for field, part in _parts(config).items():
        problems += prefixed(field, unknown_choices(part) + part.problems())
    return problems


def _of_parts(config: "ModelConfig") -> list[Problem]:
    """Return the broken rules of several parts."""
    problems = _of_encoder(config)
    if config.parametrization.kind == "completep" and not config.norms_stream:
        problem = "completep has no rule for a stream that is normed after each part"
        todo = "choose another, or parametrization=mup or standard"
        problems.append(("norm.placement", problem, todo))
    if config.has_encoder and config.in_parallel:
        problem = "attention to an encoder comes between mixer and MLP"
        problems.append(("norm.placement", problem, "choose another, or leave out encoder_layers"))
    # The key by which tokens see later ones, if they do.
    sees_all = "encoder_layers" if config.has_encoder else "" if config.causal else "causal"
    position, turning = config.position, min(mixer.turning for mixer in config.mixers_used)
    for mixer in config.mixers_used:
        if position.kind in ("alibi", "relative") and not mixer.takes_biases:
            problem = f"mixer {mixer.kind} does not add the biases of {position.kind} to scores"
            problems.append(("position", problem, "choose another position"))
        if sees_all and not mixer.takes_future:
            problem = f"mixer {mixer.kind} can't let a token of an encoder see later ones"
            problems.append((sees_all, problem, "choose another mixer, or leave it out"))
    if position.kind == "alibi" and sees_all:
        todo = "choose another position"
        problems.append(("position", "alibi's biases are for causal models", todo))
    if isinstance(position, Rotary) and position.fraction == 1 and turning < 1:
        problem = "mixer latent needs a part of each head that does not rotate"
        problems.append(("position.fraction", problem, "give less than 1, or leave it out"))
    if config.scale_embedding and position.kind == "sinusoidal":
        problem = "sinusoidal positions scale the embedding already"
        problems.append(("scale_embedding", problem, "leave it out"))
    if config.mlp.is_routed and config.bias:
        todo = "set it to false, or choose another mlp"
        problems.append(("bias", "experts have no biases", todo))
    if len({mixer.shared_values for mixer in config.mixers_used}) > 1:
        problem = "all mixers need the same share of the first layer's values"
        problems.append(("mixer_pattern", problem, "give each the same value_residual"))
    return problems + _of_tokens(config)


def _of_tokens(config: "ModelConfig") -> list[Problem]:
    """Return the broken rules of the tables of tokens and of pairs."""
    problems: list[Problem] = []
    for name in ("bigram_rows", "value_embedding"):
        if (value := getattr(config, name)) < 0:
            problems.append((name, f"{value} must not be negative", "give 0 for none"))
        elif value and config.has_encoder:
            problem = "is for a decoder or an encoder alone"
            problems.append((name, problem, "leave it out, or leave out encoder_layers"))
    if not config.value_embedding or problems:
        return problems
    if config.mtp_layers:
        problem = "the modules for later tokens have no value embedding"
        problems.append(("value_embedding", problem, "leave it out, or leave out mtp_layers"))
    others = [mixer.kind for mixer in config.mixers_used if not mixer.takes_values]
    if others:
        problem = f"mixer {others[0]} has no values of attention"
        problems.append(("value_embedding", problem, "leave it out, or choose other mixers"))
    return problems


def _of_heads(config: "ModelConfig", sized: "ModelConfig") -> list[Problem]:
    """Return the broken rules of heads and what is as wide as they are."""
    problems: list[Problem] = []
    if not any("num_heads" in part.reads for part in _blocks(config)):
        return problems
    width, num_heads, num_kv_heads = sized.width, sized.num_heads, sized.num_kv_heads
    assert width is not None
    assert num_heads is not None
    assert num_kv_heads is not None
    head_dim, usual = sized.head_dim or width // num_heads, config.head_dim or HEAD_DIM
    decisive = "head_dim" if sized.head_dim else "num_heads"  # the key of the width of a head
    if config.num_heads is None and width % usual:
        problems.append(("num_heads", f"{usual} does not divide width {width}", "give num_heads"))
    elif width % num_heads and not config.head_dim:
        problem = f"{num_heads} heads do not divide width {width}"
        problems.append(("num_heads", problem, "choose a divisor of width, or give head_dim"))
    elif sized.rotates and head_dim % 2:
        problem = f"rotary position needs even heads, not {head_dim} wide"
        problems.append((decisive, problem, f"choose another {decisive} or position"))
    elif sized.rotates and isinstance(sized.position, Rotary):
        fraction = sized.position.fraction or 1
        turning = head_dim * fraction
        even = 2 * round(turning / 2)
        # A fraction of a width is hardly exact.
        if abs(turning - even) > 1e-6 * turning or not even:
            problem = f"{fraction:g} of a head is {turning:g} wide, which is not even"
            todo = "choose one that gives an even part of a head"
            problems.append(("position.fraction", problem, todo))
        elif sized.position.scaling.kind == "ntk" and even < 4:
            problem = f"ntk needs at least 4 of a head that rotate, not {even}"
            wider = "choose wider heads" if sized.head_dim else "choose fewer heads"
            problems.append((decisive, problem, f"{wider}, or a larger position.fraction"))
    if num_heads % num_kv_heads:
        problem = f"{num_kv_heads} do not divide {num_heads} heads"
        problems.append(("num_kv_heads", problem, "choose a divisor of num_heads"))
    return problems


def _of_data(
    config: "ModelConfig", vocab_size: int | None, sequence_length: int | None
) -> list[Problem]:
    """Return the sizes that don't fit the data's."""
    problems: list[Problem] = []
    if config.vocab_size and vocab_size and config.vocab_size < vocab_size:
        problem = f"{config.vocab_size} is less than the {vocab_size} of tokenizer and objective"
        problems.append(("vocab_size", problem, "leave it out, or give at least as many"))
    longest = config.max_sequence_length
    columns = sequence_length or longest
    if config.source_length and columns and config.source_length >= columns:
        problem = f"{config.source_length} leaves the decoder none of {columns} columns"
        problems.append(("source_length", problem, "leave it out"))
    if longest and sequence_length and longest < sequence_length:
        problem = f"{longest} is less than the sequence length {sequence_length}"
        problems.append(("max_sequence_length", problem, "leave it out, or raise it"))
    return problems


def _of_mtp(config: "ModelConfig", longest: int | None) -> list[Problem]:
    """Return the broken rules of modules that predict later tokens."""
    count, field = config.mtp_layers, "mtp_layers"
    if not count:
        problem, todo = "has no effect without mtp_layers", "leave it out, or give mtp_layers=1"
        is_set = config.mtp_weight != type(config).mtp_weight
        return [("mtp_weight", problem, todo)] if is_set else []
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
    if config.shared_values:
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
    problems: list[Problem] = []
    if not config.causal:
        problem = "the decoder of an encoder-decoder sees no later token"
        problems.append(("causal", problem, "leave it out"))
    if config.mlp.is_routed:
        problem = "an encoder-decoder has no experts"
        problems.append(("mlp", problem, "choose another mlp, or leave out encoder_layers"))
    if config.parametrization.kind == "completep":
        problem = "completep has a rule for one stack of layers, not for encoder and decoder"
        problems.append(("parametrization", problem, "choose mup or standard"))
    return problems
