"""A part of the model: a frozen dataclass. Its fields are keys, its methods are rules and costs.

A block has a mixer (tokens exchange information) and an MLP (acts on each token); further parts are
positions, norms and heads. The registry of each kind of part maps the word of a config to the
class: MIXERS (mixers/), MLPS (mlps/), POSITIONS (positions/), the others in choices.py. The chosen
part brings its keys. Its torch module stands in a second file, because a plan reads this one on a
login node: invariant: no part imports torch.

All methods that take a config take a resolved ModelConfig. A FLOP is one multiplication or addition
inside a matrix product (see flops.py).
"""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]
Problem = tuple[str, str, str]  # field, what is wrong, what to do


@dataclass(frozen=True)
class Rows:
    """What a forward pass reads. masked: documents or padding hide keys."""

    micro_batch: int
    length: int
    bytes_per_value: int
    masked: bool


@dataclass(frozen=True)
class Part:
    """A choice of a config, and the keys that belong to it."""

    kind: ClassVar[str]  # the word by which a config chooses it

    def problems(self) -> list[Problem]:
        """Return the broken rules of the part's own values as (field, problem, todo)."""
        return []

    def problems_in(self, sized: "ModelConfig", longest: int | None) -> list[Problem]:
        """Return the broken rules of the part's fields together with the rest of the model.

        sized: the config with its sizes set; longest: the longest sequence, if known.
        """
        return []

    def sized(self, sized: "ModelConfig") -> "Part":
        """Return the part with the sizes that follow from those of the model."""
        return self


@dataclass(frozen=True)
class BlockPart(Part):
    """A mixer, an MLP, or attention to an encoder: a module of a block.

    module: dotted name of its torch.nn.Module, constructed with (config, part). A mixer's forward
        takes (x_BLD, context), see mixers/context.py. It may only use tokens that the context
        shows, and keeps in context.memory, if there is one, what later columns need. An MLP's takes
        (x_BLD). Muon updates the matrices of init.Linear, AdamW all other parameters;
        parametrization.scales has the initial standard deviations.
    writes: the modules inside that write to the residual stream (parametrization, rules 3 and 4).
    per_head: the modules whose parameters all heads share (parametrization, rule 10).
    heads: the counts in the module, by dotted name, of which a tensor-parallel rank has its share.
    not_muon: the matrices that Muon must not take, by parameter name, such as the gates of several
        kinds in one matrix.
    gates: the modules that make factors and decays of heads: if such a module makes one for each
        head, fp8 doesn't multiply it (fp8.py).
    stacked: the parameters that have a matrix for each expert, (E, out, in).
    reads: the sizes and choices of the model that the part reads: num_heads, num_kv_heads,
        head_dim, position. A command that sets one that no part reads is refused.
    """

    module: ClassVar[str]
    writes: ClassVar[tuple[str, ...]] = ()
    per_head: ClassVar[tuple[str, ...]] = ()
    heads: ClassVar[tuple[str, ...]] = ()
    not_muon: ClassVar[tuple[str, ...]] = ()
    gates: ClassVar[tuple[str, ...]] = ()
    stacked: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()

    def build(self, config: "ModelConfig") -> Any:
        """Return a new torch.nn.Module of this part."""
        return imported(self.module)(config, self)

    def shapes(self, config: "ModelConfig") -> Shapes:
        """Return every parameter's name inside the part and its shape, in the order of
        module.named_parameters()."""
        raise NotImplementedError  # every part has its own

    def flops(self, config: "ModelConfig", sequence_length: int, causal: bool) -> int:
        """Return the forward FLOPs of one token in one layer, those of its matrices included.

        causal: the exact FLOPs of a causal model, averaged over the positions. Otherwise as PaLM
        counts for MFU: each token attends to every position. By default: each matrix once.
        """
        return matrix_flops(self.shapes(config))

    def recomputed(self, config: "ModelConfig", sequence_length: int) -> int:
        """Return the FLOPs of one token in one layer that the backward pass recomputes, because the
        forward pass doesn't save their results."""
        return 0

    def activation_bytes(self, config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
        """Return the bytes that autograd saves of one token in one layer. norm_bytes: bytes per
        value of the input of an RMS norm."""
        raise NotImplementedError  # every part has its own

    def compiled_bytes(self, config: "ModelConfig", bytes_per_value: int) -> int:
        """Return the bytes that a compiled block saves of one token. By default: the same, but
        norms keep their inputs as they are, and make the fp32 copies again."""
        return self.activation_bytes(config, bytes_per_value, bytes_per_value)

    def kernel_bytes(self, config: "ModelConfig", bytes_per_value: int) -> int:
        """Return the bytes of a token's results of an attention kernel, which selective
        checkpointing saves."""
        return 0

    def selected_bytes(self, config: "ModelConfig", bytes_per_value: int) -> int:
        """Return the bytes that selective checkpointing saves of a token in one layer. By default:
        the result of each matrix, and those of the kernel."""
        results = bytes_per_value * outputs(self.shapes(config))
        return results + self.kernel_bytes(config, bytes_per_value)

    def selective_flops(self, config: "ModelConfig", sequence_length: int) -> int:
        """Return the forward FLOPs of one token in one layer that selective checkpointing
        recomputes: those outside of matrices and attention kernels."""
        return 0

    def idle(self, config: "ModelConfig") -> int:
        """Return the number of parameters that one token doesn't use, such as other experts."""
        return 0

    def folds(self, config: "ModelConfig", scores: float) -> dict[str, float]:
        """Return the factor of each module that gives the same outputs without the multiplier
        `scores` of attention scores (parametrization, rule 6)."""
        return {}

    def divided(self, config: "ModelConfig") -> dict[str, int]:
        """Return {parameter name: dimension} of the parameters that tensor-parallel ranks divide.

        They cut rows of the matrices that read the stream, columns of those that write to it (see
        engine/parallel/tensor.py). Empty: the part can't be divided.
        """
        return {}


@dataclass(frozen=True)
class Mixer(BlockPart):
    """How tokens exchange information.

    turning: default of position.fraction, the part of each head that rotates.
    takes_mask: the mixer reads context.mask; without such a mixer no mask is built.
    takes_future: the mixer lets a token see later ones if config.causal is false.
    takes_values: the mixer has values of attention, to which a value embedding is added.
    takes_biases: the mixer adds context.mask to the scores of each of its heads, so that alibi and
        relative positions are supported.
    splits_columns: ranks may divide the columns of rows, and exchange them for heads or pass keys
        and values around.
    passes_state: ranks may divide the columns of rows, each one run, and pass on a state.
    viewer: dotted name of a function (part, mixers/context.Columns) -> context.view, for a mixer
        that needs one. It is called once in a forward pass for all layers of equal mixers.
    """

    turning: ClassVar[float] = 1.0
    takes_mask: ClassVar[bool] = True
    takes_future: ClassVar[bool] = False
    takes_values: ClassVar[bool] = False
    takes_biases: ClassVar[bool] = False
    splits_columns: ClassVar[bool] = False
    passes_state: ClassVar[bool] = False
    viewer: ClassVar[str] = ""

    @property
    def shifts(self) -> bool:
        """True if a token's queries, keys and values depend on the previous token."""
        return False

    @property
    def shared_values(self) -> float:
        """The share of the first layer's values in those of later layers; 0: none.

        With a share, the module of the first layer returns (y_BLD, its values), and later layers
        get those in context.values.
        """
        return 0.0

    def cache_bytes(self, config: "ModelConfig", length: int, bytes_per_value: int) -> int:
        """Return the bytes that a decoding cache holds of one sequence of `length` tokens in one
        layer."""
        return 0

    def exchanged(self, config: "ModelConfig", ranks: int) -> int:
        """Return the values of one token in one layer that `ranks` exchange if they divide the
        columns of rows (parallel/groups.py). Only with splits_columns."""
        return 0

    def plain_bytes(self, config: "ModelConfig", rows: Rows) -> tuple[int, int]:
        """Return the bytes that autograd saves where the mixer runs in a plain form instead of a
        GPU's kernels: in each layer, besides activation_bytes, and for a view."""
        return 0, 0


@dataclass(frozen=True)
class Mlp(BlockPart):
    """What acts on each token alone.

    is_gated: the MLP has three matrices; its default width is 2/3 of that of an MLP with two.
    is_routed: the MLP's forward takes (x_BLD, real_BL, group) and returns (y_BLD, Routing), see
        mlps/balance.py.
    """

    is_gated: ClassVar[bool] = False
    is_routed: ClassVar[bool] = False

    @property
    def columns(self) -> int | None:
        """The columns of a row in a chunk, which the backward pass recomputes; None: no chunks."""
        return None

    def chunk_bytes(self, config: "ModelConfig", bytes_per_value: int) -> int:
        """Return the bytes of one token while a chunk is recomputed."""
        return 0

    def of_layer(self, layer: int) -> "Mlp":
        """Return the MLP of a layer: the first ones may have another."""
        return self


def imported(dotted: str) -> Any:
    """Import and return a class or function by its dotted name."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def part_of(kinds: Mapping[str, type[Part]], value: Any) -> Any:
    """Return a part from its word, such as "window", or from a block such as
    {"kind": "window", "window": 256}; a part as it is. Raises ValueError for an unknown word."""
    if isinstance(value, Part):
        return value
    keys = dict(value) if isinstance(value, Mapping) else {"kind": value}
    word = keys.pop("kind", None)
    if word not in kinds:
        raise ValueError(f"unknown kind {word!r}; choose from {', '.join(kinds)}.")
    return kinds[word](**keys)


def registry(*parts: type[Part]) -> dict[str, type[Any]]:
    """Return the parts by their words."""
    return {part.kind: part for part in parts}


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def unknown_choices(node: Any) -> list[Problem]:
    """Return the problems of a dataclass's fields whose value is none of those of their Literal."""
    problems: list[Problem] = []
    cls: Any = type(node)
    for f in fields(node):
        hint, value = _hints(cls)[f.name], getattr(node, f.name)
        choices = get_args(hint)
        if get_origin(hint) is Literal and value not in choices:
            todo = f"choose from {', '.join(choices)}"
            problems.append((f.name, f"unknown value {value!r}", todo))
    return problems


def prefixed(field: str, problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems of a part with the fields' names in the config that has it as `field`."""
    return [(f"{field}.{name}", problem, todo) for name, problem, todo in problems]


def linear(name: str, inputs: int, outputs: int, bias: bool) -> Shapes:
    """Return the shapes of an init.Linear called `name`."""
    weight: Shapes = {f"{name}.weight": (outputs, inputs)}
    return weight | ({f"{name}.bias": (outputs,)} if bias else {})


def outputs(shapes: Shapes) -> int:
    """Return the number of values that each matrix makes of one token, added up."""
    return sum(shape[0] for shape in shapes.values() if len(shape) == 2)


def matrix_flops(shapes: Shapes) -> int:
    """Return the forward FLOPs of one token that each matrix multiplies once."""
    return 2 * sum(prod(shape) for shape in shapes.values() if len(shape) == 2)


def below_1(node: Any, *names: str) -> list[Problem]:
    """Return the problems of the named fields that are set and below 1."""
    values = [(name, getattr(node, name)) for name in names]
    return [
        (name, f"{value} is not a size", "give at least 1")
        for name, value in values
        if value is not None and value < 1
    ]


def by_output(shapes: Shapes, outputs: tuple[str, ...], inputs: str) -> dict[str, int]:
    """Return `divided` of a part: the modules `outputs` by their outputs, biases too, and the
    weight of the module `inputs` by its inputs."""
    rows = {name: 0 for name in shapes if name.rpartition(".")[0] in outputs}
    return rows | {f"{inputs}.weight": 1}


def copies(num_heads: int, num_kv_heads: int, ranks: int) -> int:
    """Return how often each key and value head is sent where `ranks` divide the heads: each rank
    gets the key and value heads of its query heads, all with equally many queries."""
    group = num_heads // num_kv_heads
    return next(n for n in range(1, group + 1) if group % n == 0 and num_kv_heads * n % ranks == 0)
