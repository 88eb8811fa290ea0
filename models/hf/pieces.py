"""The place of each parameter of our models in the tensors of a Hugging Face model, by its family.

Invariant: a model that is none of ours is refused by what its config.json or its tensors say.
"""

import math
import re
from collections.abc import Collection, Iterable
from typing import Any

from forescale.models.config import ModelConfig
from forescale.models.flops import shapes
from forescale.models.hf import two_sided
from forescale.models.hf.config_json import config_from_hf
from forescale.models.hf.families import FAMILIES, LACKING, module_names
from forescale.models.hf.piece import Piece, matched

FUSED = ("query", "key", "value")  # some families have them in one matrix, in this order
# Constants that older files hold.
_CONSTANT = re.compile(r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")
KINDS = (*FAMILIES, *two_sided.KINDS)  # each model_type that import takes


def config_of(hf_config: dict[str, Any], names: Collection[str] = ()) -> ModelConfig:
    """Return our config for the content of a config.json, and the names of the tensors in the
    files.

    Raises ValueError for an unknown architecture, for a variant that is not supported, and for a
    missing key.
    """
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        needs = f"; it needs {LACKING[str(kind)]}, no part here" if str(kind) in LACKING else ""
        raise ValueError(f"its model_type is {kind!r}, not one of {', '.join(KINDS)}{needs}.")
    try:
        if kind in two_sided.KINDS:
            return two_sided.config_from_hf(kind, hf_config, names)
        return config_from_hf(kind, hf_config)
    except KeyError as e:
        raise ValueError(f"it has no {e.args[0]}.") from None
    except (AttributeError, TypeError, ZeroDivisionError) as e:
        raise ValueError(f"one of its values is of a kind that no model has ({e}).") from None


def architecture_of(kind: str) -> str:
    """Return the class of transformers of a model_type."""
    return FAMILIES[kind].architecture if kind in FAMILIES else two_sided.KINDS[kind]


def pieces_of(hf_config: dict[str, Any], config: ModelConfig, names: Iterable[str]) -> list[Piece]:
    """Return the pieces of all parameters. config: of the content of config.json. names: of the
    tensors in the files; ValueError for an unknown or missing one."""
    kind: str = hf_config["model_type"]
    if kind in two_sided.KINDS:
        there = {usual: name for name in names if (usual := two_sided.usual_name(name, config))}
        return matched(kind, [*two_sided.pieces(config, hf_config)], there)
    there = {}
    for name in names:
        usual = name
        if kind == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
            usual = f"transformer.{name}"  # OpenAI's own files leave it out
        if not _CONSTANT.search(name) and not (usual == "lm_head.weight" and config.tie_embeddings):
            there[usual] = name
    return matched(kind, [*pieces(kind, config)], there)


def pieces(family: str, config: ModelConfig) -> Iterable[Piece]:
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
