"""The cost record of a part of a block, which FLOPs, memory, plans and muP read.

All functions take a resolved ModelConfig. A FLOP is one multiplication or addition inside a matrix
product (see flops.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]
Problem = tuple[str, str, str]  # field, what is wrong, what to do


def _zero(config: "ModelConfig", *sizes: int) -> int:
    return 0


def _empty(config: "ModelConfig", *scores: float) -> dict[str, Any]:
    return {}


def _no_problems(config: "ModelConfig", full: "ModelConfig", longest: int | None) -> list[Problem]:
    return []


def _never(config: "ModelConfig") -> bool:
    return False


def _no_plain_form(
    config: "ModelConfig", micro_batch: int, length: int, bytes_per_value: int, masked: bool
) -> tuple[int, int]:
    return 0, 0


@dataclass(frozen=True)
class Part:
    """A mixer, an MLP, or attention to an encoder (cross.py).

    module: the dotted name of its class, a torch.nn.Module that is made with the config alone. A
        mixer's forward takes (x_BLD, context), see mixers/context.py, and may only use tokens that
        the context shows, and keeps in context.memory what later columns need, if it is given; an
        MLP's takes (x_BLD). Muon updates the matrices of init.Linear, AdamW all other parameters;
        parametrization.scales has the initial standard deviations that mup and completep need.
    shapes: every parameter's name inside the part and its shape, in the order of
        module.named_parameters().
    flops: (config, sequence_length, causal) -> forward FLOPs of one token in one layer, its
        matrices included. causal: exactly what a causal model needs, averaged over the positions;
        otherwise as PaLM counts for MFU: each token attends to every position.
    recomputed: (config, sequence_length) -> FLOPs of one token in one layer that the backward pass
        makes again, beside twice the forward's: what the part does not keep.
    activation_bytes: (config, bytes_per_value, norm_bytes) -> bytes that autograd keeps of one
        token in one layer. norm_bytes: bytes per value of the input of an RMS norm.
    chunk_bytes: (config, bytes_per_value) -> bytes that an MLP keeps of one token while a chunk of
        config.mlp_chunk columns is computed again in the backward pass.
    kernel_bytes: (config, bytes_per_value) -> bytes of a token's results of an attention kernel,
        which selective checkpointing keeps, beside those of its matrices.
    selected_bytes: (config, bytes_per_value) -> bytes of all that it keeps of a token, where that
        is not a result of each matrix and kernel_bytes; of a source's token, selected_source.
    made_again: (config, sequence_length) -> forward FLOPs of one token in one layer that it makes
        again: those of no matrix and of no kernel.
    cache_bytes: (config, length, bytes_per_value) -> bytes that a decoding cache would keep of
        one sequence of `length` tokens in one layer, of attention to an encoder for a source of
        that length; `plan` shows it.
    source_flops: (config) -> forward FLOPs of one token of the encoder's output in one layer.
    source_bytes: (config, bytes_per_value, norm_bytes) -> what autograd keeps of such a token.
    writes: the modules inside that write to the residual stream (parametrization, rules 3 and 4).
    per_head: the modules whose parameters all heads share (parametrization, rule 10).
    folds: (config, scores) -> the factor of each module that gives the same outputs without the
        multiplier `scores` of attention scores (parametrization, rule 6).
    divided: config -> {parameter name: dimension}: of which each tensor-parallel rank has a part,
        cut along the dimension: rows of the matrices that read the stream, columns of those that
        write to it (see engine/parallel/tensor.py); {} for a part that can't be divided.
    heads: the counts in the module, by dotted name, of which each such rank has a part.
    not_muon: the matrices inside that are not of init.Linear, by parameter name, such as the gates
        of several kinds in one matrix.
    gates: the modules that make the factors and decays of heads: where such a module makes one for
        each head, it is not multiplied in fp8 (fp8.py).
    stacked: the parameters that are a matrix for each expert, (E, out, in): Muon takes each matrix.
    idle: config -> the parameters that one token does not use, such as other tokens' experts.
    keys: the fields of ModelConfig that this part reads and most others don't: where no part of the
        model has them, they must be left out.
    reads: the fields that most other parts read too, and presets set: where no part of the model
        has them, a command must leave them out (models/effects.py).
    problems: (config, full, longest) -> the broken rules of these keys, as ModelConfig.problems has
        them. full: config with its sizes set; longest: the longest sequence, if known.
    turning: the default of rope_fraction, the part of each head that rotates.
    takes_mask: the mixer reads context.mask; without such a mixer no mask is built.
    takes_future: the mixer lets a token see later ones where config.causal is false.
    takes_values: with config.value_residual the mixer returns (y_BLD, its values) in the first
        layer, and mixes those into its own in the later ones, which find them in context.values.
    takes_biases: a mixer adds context.mask to the scores of each of its config.num_heads heads, so
        that it may have the biases of alibi (alibi.biased_mask) or of relative positions.
    exchanged: (config, ranks) -> values of one token in one layer that a mixer exchanges where so
        many ranks divide the columns of rows (context.group, parallel/sequence.py); None: it can't.
    viewer: the dotted name of a function (config, layer) -> a function of mixers/context.Columns
        that makes context.view, for a mixer that needs one. It is called once in a forward pass for
        all layers of the mixer or, where varies(config), for each.
    varies: views differ from layer to layer.
    plain_bytes: (config, micro_batch, length, bytes_per_value, masked) -> bytes that autograd keeps
        where the mixer runs in a plain form instead of a GPU's kernels: in each layer, besides
        activation_bytes, and for a view.
    is_routed: the MLP's forward takes (x_BLD, real_BL, group) and returns (y_BLD, Routing), see
        experts/balance.py.
    is_gated: the MLP has three matrices; its default width is 2/3 of that of an MLP with two.
    """

    module: str
    shapes: Callable[["ModelConfig"], Shapes]
    flops: Callable[["ModelConfig", int, bool], int]
    activation_bytes: Callable[["ModelConfig", int, int], int]
    writes: tuple[str, ...]
    chunk_bytes: Callable[["ModelConfig", int], int] = _zero
    kernel_bytes: Callable[["ModelConfig", int], int] = _zero
    selected_bytes: Callable[["ModelConfig", int], int] | None = None
    selected_source: Callable[["ModelConfig", int], int] = _zero
    made_again: Callable[["ModelConfig", int], int] = _zero
    cache_bytes: Callable[["ModelConfig", int, int], int] = _zero
    recomputed: Callable[["ModelConfig", int], int] = _zero
    source_flops: Callable[["ModelConfig"], int] = _zero
    source_bytes: Callable[["ModelConfig", int, int], int] = _zero
    per_head: tuple[str, ...] = ()
    folds: Callable[["ModelConfig", float], dict[str, float]] = _empty
    divided: Callable[["ModelConfig"], dict[str, int]] = _empty
    heads: tuple[str, ...] = ()
    not_muon: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()
    idle: Callable[["ModelConfig"], int] = _zero
    keys: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    problems: Callable[["ModelConfig", "ModelConfig", int | None], list[Problem]] = _no_problems
    turning: float = 1.0
    takes_mask: bool = True
    takes_future: bool = False
    takes_biases: bool = False
    takes_values: bool = False
    exchanged: Callable[["ModelConfig", int], int] | None = None
    viewer: str = ""
    varies: Callable[["ModelConfig"], bool] = _never
    plain_bytes: Callable[["ModelConfig", int, int, int, bool], tuple[int, int]] = _no_plain_form
    is_gated: bool = False
    is_routed: bool = False

    def selected(self, config: "ModelConfig", bytes_per_value: int) -> int:
        """Return the bytes that selective checkpointing keeps of a token in one layer."""
        if self.selected_bytes is not None:
            return self.selected_bytes(config, bytes_per_value)
        results = bytes_per_value * outputs(self.shapes(config))
        return results + self.kernel_bytes(config, bytes_per_value)


def linear(name: str, inputs: int, outputs: int, bias: bool) -> Shapes:
    """Return the shapes of an init.Linear called `name`."""
    weight: Shapes = {f"{name}.weight": (outputs, inputs)}
    return weight | ({f"{name}.bias": (outputs,)} if bias else {})


def outputs(shapes: Shapes) -> int:
    """Return the values that one token becomes where it is multiplied by each matrix once."""
    return sum(shape[0] for shape in shapes.values() if len(shape) == 2)


def matrix_flops(shapes: Shapes) -> int:
    """Return the forward FLOPs of one token that is multiplied by each matrix once."""
    return 2 * sum(prod(shape) for shape in shapes.values() if len(shape) == 2)


def below_1(config: "ModelConfig", *names: str) -> list[Problem]:
    """Return the problems of those of the fields that are given and are no size."""
    given = [(name, getattr(config, name)) for name in names]
    return [
        (name, f"{value} is not a size", "give at least 1")
        for name, value in given
        if value is not None and value < 1
    ]


def by_output(shapes: Shapes, outputs: tuple[str, ...], inputs: str) -> dict[str, int]:
    """Return `divided` of a part: the modules `outputs` by their outputs, biases too, and the
    weight of the module `inputs` by its inputs."""
    rows = {name: 0 for name in shapes if name.rpartition(".")[0] in outputs}
    return rows | {f"{inputs}.weight": 1}
