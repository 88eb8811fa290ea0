"""The place of each parameter of our models in the tensors of a Hugging Face model.

Import and export both read it. Invariant: the pieces have every element of every parameter once, in
the order of the parameters, and each piece is in one tensor, so that no model is ever held whole.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from forescale.models.config import ModelConfig
from forescale.models.flops import shapes
from forescale.models.hf.config_json import config_from_hf
from forescale.models.hf.families import FAMILIES, LACKING, module_names

FUSED = ("query", "key", "value")  # some families have them in one matrix, in this order
# Constants that older files hold.
_CONSTANT = re.compile(r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Piece:
    """A contiguous part of our parameter `name`: `shape`, from element `start` on.

    In the Hugging Face tensor `source`, transposed if `is_turned`, it is `part` (i, n): the i-th of
    n equal parts of the rows, or of those of each of `heads`. `added`: what the import adds to each
    number.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    source: str
    part: tuple[int, int] = (0, 1)
    is_turned: bool = False
    added: float = 0.0
    heads: int = 1

    def taken(self, source: Tensor) -> Tensor:
        """Return the piece of `source`, contiguous, in its number format, or in fp32 if something
        is added. Raises ValueError if `source` does not have the shape that config.json implies."""
        index, count = self.part
        expected = (count * self.shape[0], *self.shape[1:])
        expected = expected[::-1] if self.is_turned else expected
        if tuple(source.shape) != expected:
            problem = f"the weight {self.source} is {list(source.shape)}"
            raise ValueError(f"{problem}, and {list(expected)} by config.json.")
        part = source.T if self.is_turned else source
        if self.heads > 1:
            part = part.unflatten(0, (self.heads, count, -1))[:, index].flatten(0, 1)
        else:
            part = part.narrow(0, index * self.shape[0], self.shape[0])
        return (part.float() + self.added if self.added else part).contiguous()


def exported(
    family: str, config: ModelConfig, state: Mapping[str, Tensor], factors: dict[str, float]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors by name, made of the parameters times their factors. Each
    parameter is read from `state` when it is needed, and not held."""
    sources: dict[str, list[Piece]] = {}
    for piece in _pieces(family, config):
        sources.setdefault(piece.source, []).append(piece)
    name, whole = "", torch.empty(0)  # the last parameter: successive experts share one
    for source, pieces in sources.items():
        tensors: list[Tensor] = []
        for piece in pieces:
            if piece.name != name:
                name, whole = piece.name, state[piece.name]
                whole = whole * factors[name] if name in factors else whole
            tensor = whole
            if whole.shape != piece.shape:
                tensor = whole[piece.start // math.prod(piece.shape)].clone()  # files hold no views
            tensors.append(tensor - piece.added if piece.added else tensor)
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if (heads := pieces[0].heads) > 1:
            tensor = tensor.unflatten(0, (len(tensors), heads, -1)).transpose(0, 1).flatten(0, 2)
        yield source, tensor.T.contiguous() if pieces[0].is_turned else tensor


def joined(parts: list[Tensor]) -> Tensor:
    """Return a parameter from all its pieces. Several pieces are the matrices of a stack."""
    return torch.stack(parts) if len(parts) > 1 else parts[0]


def config_of(hf_config: dict[str, Any]) -> ModelConfig:
    """Return our config for the content of a config.json.

    Raises ValueError for an unknown architecture, for a variant that is not supported, and for a
    missing key.
    """
    family = hf_config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        needs = f"; it needs {LACKING[str(family)]}, no part here" if str(family) in LACKING else ""
        raise ValueError(f"its model_type is {family!r}, not one of {', '.join(FAMILIES)}{needs}.")
    try:
        return config_from_hf(family, hf_config)
    except KeyError as e:
        raise ValueError(f"it has no {e.args[0]}.") from None
    except (AttributeError, TypeError, ZeroDivisionError) as e:
        raise ValueError(f"one of its values is of a kind that no model has ({e}).") from None


def pieces_of(family: str, config: ModelConfig, names: Iterable[str]) -> list[Piece]:
    """Return the pieces of all parameters. names: of the tensors in the files; ValueError for an
    unknown or missing one."""
    pieces, there = list(_pieces(family, config)), dict[str, str]()
    for name in names:
        usual = name
        if family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
            usual = f"transformer.{name}"  # OpenAI's own files leave it out
        if not _CONSTANT.search(name) and not (usual == "lm_head.weight" and config.tie_embeddings):
            there[usual] = name
    sources = dict.fromkeys(piece.source for piece in pieces)
    if missing := [name for name in sources if name not in there]:
        raise ValueError(f"the weight {missing[0]} is missing{_others(missing)}.")
    if unknown := [name for name in there if name not in sources]:
        raise ValueError(f"unexpected weight {unknown[0]} in a {family} model{_others(unknown)}.")
    return [replace(piece, source=there[piece.source]) for piece in pieces]


def _others(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _pieces(family: str, config: ModelConfig) -> Iterable[Piece]:
    """Yield the pieces of all parameters, with the names that an export gives the tensors."""
    names, f = module_names(family, config), FAMILIES[family]
    for name, shape in shapes(config).items():
        module, _, leaf = name.rpartition(".")
        block, _, last = module.rpartition(".")
        if len(shape) == 3:  # all experts; each of them is a tensor there
            size = math.prod(shape[1:])
            for e in range(shape[0]):
                source = f"{names[f'{module}.{e}']}.{leaf}"
                yield Piece(name, e * size, shape[1:], source)
        else:
            part = (FUSED.index(last), 3) if f.fused and last in FUSED else (0, 1)
            module = f"{block}.qkv" if part[1] > 1 else module
            # GPT-2 keeps them as (in, out).
            turned = family == "gpt2" and name.startswith("blocks.") and len(shape) == 2
            added = float(f.gains_less_one and module.endswith("norm"))
            heads = config.sizes.num_heads if f.fused == "heads" and part[1] > 1 else 1
            source = f"{names[module]}.{leaf}"
            yield Piece(name, 0, shape, source, part, turned, added, heads)
