"""The mixers of layers, with windows and bases of rotations, to and from config.json."""

from dataclasses import replace
from typing import Any

from forescale.models.config import ModelConfig
from forescale.models.hf.families import FAMILIES
from forescale.models.mixers.attention import Attention
from forescale.models.mixers.window import Window
from forescale.models.part import Mixer

FULL, SLIDING = "full_attention", "sliding_attention"


def layers_to_hf(family: str, c: ModelConfig, rope: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of layers. rope: rope_parameters of the config's position."""
    rule, windows = FAMILIES[family].layers, [m for m in c.mixers if isinstance(m, Window)]
    if rule == "alike":
        return {}
    if rule == "rotation":
        return {
            "no_rope_layers": [int(getattr(m, "theta", None) != 0) for m in c.mixers],
            "layer_types": [FULL] * len(c.mixers),
            "use_sliding_window": False,
        }
    width = {"sliding_window": windows[0].window if windows else None}
    if rule == "window":
        return width
    width = width if windows else {"sliding_window": c.sizes.max_sequence_length}  # never null
    keys = width | {"layer_types": [SLIDING if m.kind == "window" else FULL for m in c.mixers]}
    thetas = {SLIDING if m.kind == "window" else FULL: getattr(m, "theta", None) for m in c.mixers}
    bases = {FULL: rope, SLIDING: rope}  # every kind is there, as transformers wants it
    bases |= {k: {"rope_type": "default", "rope_theta": by} for k, by in thetas.items() if by}
    # transformers 4 reads the first.
    return keys | {"rope_local_base_freq": bases[SLIDING]["rope_theta"], "rope_parameters": bases}


def layers_from_hf(family: str, hf: dict[str, Any], mixer: Attention) -> dict[str, Any]:
    """Return the fields mixer and mixer_pattern. mixer: with the keys that all layers have. Raises
    ValueError for a kind of layers that is not computed.

    A window that is as long as the context, or longer, hides nothing.
    """
    rule, count = FAMILIES[family].layers, hf["num_hidden_layers"]
    types = hf.get("layer_types") or [FULL] * count
    width, longest = hf.get("sliding_window"), hf["max_position_embeddings"]
    if rule == "rotation":
        every = hf.get("no_rope_layer_interval", 4)
        turns = hf.get("no_rope_layers") or [(i + 1) % every for i in range(count)]
        still = replace(mixer, theta=0)
        return _pattern([mixer if turn else still for turn in turns[:count]])
    if rule == "window":
        types = [SLIDING if width else FULL] * count
    elif rule == "bases" and not hf.get("layer_types"):
        every = hf["sliding_window_pattern"]
        types = [SLIDING if (i + 1) % every else FULL for i in range(count)]
    window = mixer
    if width and width < longest:
        window = Window(**vars(mixer), window=width)
    if rule == "bases" and (theta := _own_base(hf)) is not None:
        window = replace(window, theta=theta)
    return _pattern([mixer if one == FULL else window for one in types[:count]])


def _own_base(hf: dict[str, Any]) -> float | None:
    """Return the base of rotations of windows, None if they rotate as all layers do."""
    rope, theta = hf.get("rope_parameters") or {}, hf["rope_theta"]
    other = hf.get("rope_local_base_freq", theta)
    if FULL not in rope:  # transformers 4, where no scaling is of windows
        return None if other == theta and not hf.get("rope_scaling") else float(other)
    plain = {"rope_theta": theta, "rope_type": "default"}
    local = plain | {"rope_theta": other} | (rope.get(SLIDING) or {})
    if local == plain | rope[FULL]:
        return None
    if (kind := local["rope_type"]) != "default":
        raise ValueError(f"its rope_parameters.{SLIDING} is {kind}, which is not computed here.")
    return float(local["rope_theta"])


def _pattern(mixers: list[Mixer]) -> dict[str, Any]:
    """Return the fields for the mixers of layers: the shortest pattern that repeats to them."""
    lengths = range(1, len(mixers) + 1)
    period = next(n for n in lengths if (mixers[:n] * len(mixers))[: len(mixers)] == mixers)
    pattern = mixers[:period]
    # A bare word of a pattern would have the keys of `mixer`, if that is of the same kind.
    mixer = next((m for m in pattern if m == type(m)()), pattern[0])
    return {"mixer": mixer, "mixer_pattern": pattern if period > 1 else []}
