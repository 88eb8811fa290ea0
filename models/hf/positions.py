"""Rotary positions in Hugging Face's config.json, to and from a ModelConfig.

Invariant: transformers 4 and 5 compute from the keys what our model computes.
"""

import json
from typing import Any

from forescale.models.config import ModelConfig
from forescale.models.positions.kinds import Llama3, Ntk, Rotary, Yarn
from forescale.models.positions.rope_scaling import (
    BETA_FAST,
    BETA_SLOW,
    LEAST,
    MOST,
    ntk_theta,
    yarn_attention,
)


def positions_to_hf(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of rotary positions.

    ntk becomes a larger base without scaling, because transformers' "dynamic" changes with the
    sequence. For yarn, transformers 4 computes the factor from the two lengths and 5 reads the
    factor, so all three must agree. Raises ValueError if the original length is not whole.
    """
    assert isinstance(c.position, Rotary)
    by, theta = c.position.scaling, c.position.theta
    theta = ntk_theta(c) if isinstance(by, Ntk) else theta
    longest, scaling = c.max_sequence_length, None  # Apertus scales unless the key says otherwise
    if isinstance(by, Yarn | Llama3):
        original = by.original(c)
        last = original * by.factor if isinstance(by, Yarn) else original
        if original % 1 or last % 1:
            raise ValueError(
                f"Hugging Face's config needs whole lengths, not {by.kind} from {original:g} to "
                f"{last:g} tokens; give model.position.scaling.original_length."
            )
        scaling = {
            "rope_type": by.kind,
            "factor": by.factor,
            "original_max_position_embeddings": int(original),
        }
        if isinstance(by, Yarn):
            longest = int(last)
            scaling |= {
                "attention_factor": yarn_attention(by.factor),
                "beta_fast": float(BETA_FAST),
                "beta_slow": float(BETA_SLOW),
            }
        else:
            scaling |= {"low_freq_factor": float(LEAST), "high_freq_factor": float(MOST)}
    return {
        "max_position_embeddings": longest,
        "rope_theta": theta,  # transformers 4 reads this and the next key, 5 the third
        "rope_scaling": scaling,
        "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": theta},
    }


def positions_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Return max_sequence_length and the block of the position: the inverse of positions_to_hf.

    Raises ValueError for a scaling that is not supported.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    longest, scaling = hf["max_position_embeddings"], dict[str, Any](kind="none")
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ("default", "yarn", "llama3"), "rope_parameters.rope_type", kind)
    for name, inside in (("", hf), ("rope_parameters.", rope)):
        part = inside.get("partial_rotary_factor")
        require(part in (None, 1), f"{name}partial_rotary_factor", part)
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or longest
        factor = float(rope.get("factor") or longest / original)
        usual: dict[str, Any] = {"beta_fast": BETA_FAST, "beta_slow": BETA_SLOW, "truncate": True}
        usual |= {"mscale": None, "mscale_all_dim": None}
        usual["attention_factor"] = yarn_attention(factor)
        for name, value in usual.items():
            require(rope.get(name) in (None, value), f"rope_parameters.{name}", rope.get(name))
        scaling = {"kind": "yarn", "factor": factor}
        if original * factor != longest:
            scaling["original_length"] = original
    if kind == "llama3":
        for name, number in (("low_freq_factor", LEAST), ("high_freq_factor", MOST)):
            require(rope.get(name) == number, f"rope_parameters.{name}", rope.get(name))
        scaling = {"kind": "llama3", "factor": float(rope["factor"])}
        scaling["original_length"] = rope["original_max_position_embeddings"]
    position = {"kind": "rotary", "theta": theta, "scaling": scaling}
    return {"max_sequence_length": longest, "position": position}


def only(hf: dict[str, Any], key: str, *computed: Any) -> None:
    """Raise ValueError with `key` and its value, unless the value is absent, null or `computed`."""
    value = hf.get(key)
    alike = [one for one in computed if isinstance(one, bool) == isinstance(value, bool)]
    require(value in (None, *alike), key, value)  # true is no 1


def require(true: bool, key: str, value: Any) -> None:
    """Raise ValueError with `key` and its `value` unless `true`."""
    if not true:
        raise ValueError(f"its {key} is {as_text(value)}, a variant that is not computed here.")


def as_text(value: Any) -> str:
    """Return a value of a config.json as it stands there, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
