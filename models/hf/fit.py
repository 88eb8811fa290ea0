"""Which family a config fits, and what stands in the way of the others."""

from typing import Any

from forescale.models.config import ModelConfig
from forescale.models.hf.families import FAMILIES
from forescale.models.part import Part


def family_of(config: ModelConfig, prefer: str | None = None) -> str:
    """Return the family of a resolved config; of several that fit `prefer`, or the first. Raises
    ValueError, which names the nearest family, if none fits."""
    if prefer in FAMILIES and not differences(prefer, config):
        return prefer
    different = {name: differences(name, config) for name in FAMILIES}
    # Of equally near families, one with the same MLP.
    nearest = min(different, key=lambda name: (len(different[name]), "mlp" in different[name]))
    if not different[nearest]:
        return nearest
    raise ValueError(
        f"No Hugging Face architecture fits this model; the nearest, "
        f"{FAMILIES[nearest].architecture}, has {', '.join(different[nearest].values())}."
    )


def differences(family: str, config: ModelConfig) -> dict[str, str]:
    """Return what of a resolved config does not fit a family, in words, by path."""
    different = differing(FAMILIES[family].fits, config)
    if "mixer" not in different and (problem := _of_layers(family, config)):
        different["mixer_pattern"] = problem
    return different


def differing(fits: dict[str, Any], config: ModelConfig) -> dict[str, str]:
    """Return the keys that have other values than these choices (Family.fits), in words, by
    path."""
    fits, s = dict(fits), config.sizes
    if "num_kv_heads" in fits:
        fits["num_kv_heads"] = config.num_heads
    values = {path: _values(config, path) for path in fits}
    if "head_dim" in fits:
        values["head_dim"], fits["head_dim"] = [s.head_dim], s.width // s.num_heads
    keys: dict[str, str] = {}
    for path, different in values.items():
        choices = fits[path] if isinstance(fits[path], tuple) else (fits[path],)
        if not {*different} <= {*choices, ...}:
            typed = " or ".join(map(_typed, choices))
            keys[path] = f"{path}={typed} (not {', '.join(map(_typed, different))})"
    return keys


def _of_layers(family: str, config: ModelConfig) -> str:
    """Return how the layers differ in a way that the family's don't, "" if they don't."""
    mixers, kinds = {*config.mixers}, {mixer.kind for mixer in config.mixers}
    if not {*_values(config, "mixer.global_tokens")} <= {0, ...}:
        return "mixer.global_tokens=0"
    rule, thetas = FAMILIES[family].layers, {*_values(config, "mixer.theta")}
    if rule == "rotation":
        return "" if thetas <= {None, 0} else "mixer.theta=0 or none, and no other base"
    if thetas != {None} and (rule != "bases" or 0 in thetas):
        return f"no mixer.theta={', '.join(_typed(t) for t in thetas if t is not None)}"
    if rule == "bases":
        return "" if len(mixers) == len(kinds) else "one width of all windows"
    return "" if rule == "alike" or len(kinds) == 1 else "the same mixer in each layer"


def _values(config: ModelConfig, path: str) -> list[Any]:
    """Return the different values of a key, or the words of a part; `...` of a chosen part that
    lacks the key."""
    field, _, inner = path.partition(".")
    values = [*dict.fromkeys(config.mixers)] if field == "mixer" else [getattr(config, field)]
    if isinstance(values[0], Part) and not inner:
        return [*dict.fromkeys(part.kind for part in values)]
    return [*dict.fromkeys(getattr(value, inner, ...) if inner else value for value in values)]


def _typed(value: Any) -> str:
    """Return a value of a config as a user types it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
