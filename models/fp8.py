"""Which matrices of a model are multiplied in fp8 (precision.fp8), and what that asks of sizes.

All functions take a resolved ModelConfig. Of x (M, K) and a matrix (N, K) there are three products,
over K, over N and, for the gradient of the matrix, over M. Tensor cores take fp8 in pieces of 16
bytes, so K, N and M are multiples of 16 (cuBLASLt; torch._scaled_mm). Imports no torch.
"""

from typing import TYPE_CHECKING

from forescale.models.flops import columns_of, divided, layers_of, matrices, shapes, stacked
from forescale.models.part import Shapes

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

Refusal = tuple[str, str]  # what is wrong, what to do

PIECE = 16  # values
_SIZES = ("width", "mlp_width")  # of the model; and of its parts:
_PART_SIZES = ("expert_width", "rank", "query_rank", "value_dim")
_OFF = "or leave precision.fp8 out"


def fp8_matrices(config: "ModelConfig", tensor: int = 1) -> Shapes:
    """Return the matrices by parameter name, with the shape (N, K) of the part that each of
    `tensor` ranks has: those of init.Linear in the blocks.

    The head, tables of tokens, experts and modules that predict later tokens are not among them;
    nor is a matrix that makes one number for each head, as of gates and decays: it is small, and
    its number changes all that a head does.
    """
    sizes, cut = shapes(config), divided(config, tensor)
    gates = {
        f"blocks.{i}.{name}.{gate}.weight"
        for i, parts in enumerate(layers_of(config))
        for name, part in parts.items()
        for gate in part.gates
    }
    names = matrices(config) - stacked(config)
    shapes_of_ranks: Shapes = {}
    for name in (n for n in sizes if n in names and n.startswith("blocks.")):
        shape = list(sizes[name])
        if name in gates and shape[0] == config.sizes.num_heads:
            continue
        if name in cut:
            shape[cut[name]] //= tensor
        shapes_of_ranks[name] = tuple(shape)
    return shapes_of_ranks


def sizes_refused(config: "ModelConfig", tensor: int = 1) -> list[Refusal]:
    """Return why the matrices can't be multiplied in fp8, one reason for each size. `tensor` ranks
    divide them."""
    refusals: dict[int, Refusal] = {}
    for name, shape in fp8_matrices(config, tensor).items():
        for size in shape:
            if size % PIECE == 0 or size in refusals:
                continue
            whose = f"a rank's part of {name}" if tensor > 1 else name
            problem = f"{whose} is {shape[0]} x {shape[1]}, and fp8 takes multiples of {PIECE}"
            whole = (size, size * tensor)
            keys = [f"model.{key}" for key in _SIZES if getattr(config, key) in whole]
            keys += [
                f"model.{field}.{key}"
                for field, part in (("mlp", config.mlp), ("mixer", config.mixer))
                for key in _PART_SIZES
                if getattr(part, key, None) in whole
            ]
            wide = "model.head_dim" if config.head_dim else "model.width"
            todo = " or ".join(keys) or f"{wide}, model.num_heads or model.num_kv_heads"
            refusals[size] = (problem, f"change {todo}, {_OFF}")
    return [*refusals.values()]


def rows_refused(
    config: "ModelConfig", micro_batch: int, length: int, sequence: int = 1
) -> list[Refusal]:
    """Return why the tokens that a rank multiplies at once can't be in fp8. `sequence` ranks divide
    the columns of rows of `length`."""
    lengths = {columns_of(config, i, length) // sequence for i in range(config.num_blocks)}
    if chunk := config.mlp.columns:
        wide = [columns for columns in lengths if columns > chunk]
        lengths |= {part for columns in wide for part in (chunk, columns % chunk or chunk)}
    for columns in sorted(lengths):
        if (tokens := micro_batch * columns) % PIECE:
            problem = (
                f"a rank multiplies {micro_batch} x {columns} = {tokens} tokens at once, and fp8"
            )
            todo = f"change train.micro_batch or train.sequence_length, {_OFF}"
            return [(f"{problem} takes multiples of {PIECE}", todo)]
    return []
