"""Configs of models by keys, with `__` for the dot of the command line: mixer__window=5."""

from dataclasses import fields, replace
from typing import Any

from forescale.models import ModelConfig
from forescale.models.part import part_of


def model_config(**keys: Any) -> ModelConfig:
    """Return a config with these keys."""
    return changed(ModelConfig(), **keys)


def changed(config: Any, **keys: Any) -> Any:
    """Return a config, or a part, with other keys; a part of another kind has the keys that both
    kinds have. With mixer_pattern, keys of the mixer are those of all its mixers that have them."""
    kinds = {f.name: f.metadata["kinds"] for f in fields(config) if "kinds" in f.metadata}
    values = {name: value for name, value in keys.items() if "__" not in name}
    pattern = values.get("mixer_pattern", getattr(config, "mixer_pattern", []))
    inner: dict[str, dict[str, Any]] = {}
    for name, value in keys.items():
        if "__" in name:
            part, _, key = name.partition("__")
            inner.setdefault(part, {})[key] = value
    of_mixer = inner.pop("mixer", {}) if pattern else {}
    for name in {*values, *inner} & kinds.keys() - {"mixer_pattern"}:
        below = getattr(config, name)
        value = values.get(name, below)
        part = part_of(kinds[name], value)
        names = _names(part) & _names(below) if isinstance(value, str) else ()
        shared = {key: getattr(below, key) for key in names}
        values[name] = changed(part, **shared | inner.get(name, {}))
    if pattern:
        values["mixer_pattern"] = [
            changed(part, **{k: v for k, v in of_mixer.items() if k in _names(part)})
            for part in (part_of(kinds["mixer"], one) for one in pattern)
        ]
    return replace(config, **values)


def _names(part: Any) -> set[str]:
    return {f.name for f in fields(part)}
