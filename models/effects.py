"""Which keys of a model's config have no effect, because nothing in this model reads them.

Invariant: a config with such keys is built as any other: presets and frozen configs hold them, and
only a command that sets one is refused. Imports no torch.
"""

from typing import TYPE_CHECKING

from forescale.models.costs import MIXERS
from forescale.models.costs.record import Problem
from forescale.models.rules import of_values, parts_used

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

_NOTHING = (None, False, "none")  # values that ask for nothing
_READ_WITH = {  # a field that is read only where another has one of some values
    "base_width": ("parametrization", ("mup", "completep")),
    "base_depth": ("parametrization", ("completep",)),
    "rope_theta": ("position", ("rotary",)),
    "qk_norm_over": ("qk_norm", (True,)),
    "qkv_bias": ("bias", (False,)),
}


def unread(config: "ModelConfig") -> list[Problem]:
    """Return the keys that have no effect in this model, as problems() has its own.

    Of a config with a value that is not allowed nothing is known.
    """
    if of_values(config):
        return []
    found: list[Problem] = []
    for name, (other, values) in _READ_WITH.items():
        if (given := getattr(config, other)) not in values:
            todo = f"leave it out, or choose {other}={str(values[0]).lower()}"
            found.append((name, f"has no effect with {other}={str(given).lower()}", todo))
    if config.num_layers and config.width:
        problem = "has no effect beside num_layers and width, which are set"
        found.append(("depth", problem, "set these instead, or choose model=depth"))
    if config.mixer_pattern:
        found.append(("mixer", "has no effect beside mixer_pattern", "leave one of them out"))
    found += _of_other_mixers(config)
    return [broken for broken in found if getattr(config, broken[0]) not in _NOTHING]


def _of_other_mixers(config: "ModelConfig") -> list[Problem]:
    """Return the fields that most mixers read, but none of the model's."""
    read = {name for part in parts_used(config) for name in part.reads}
    if config.position in ("learned", "sinusoidal"):
        read.add("position")  # these are added to the embedding
    problem = f"has no effect with mixer {' and '.join(config.mixers_used)}"
    found: list[Problem] = []
    for mixer, part in MIXERS.items():
        todo = f"leave it out, or choose mixer={mixer}"
        found += [(name, problem, todo) for name in part.reads if name not in read]
        read.update(part.reads)
    return found
