"""What a model must be like to divide the columns of its rows among ranks (sequence.py).

Invariant: what no rule here forbids computes the same as on one rank. Imports no torch: a plan
reads this file on a login node.
"""

from typing import TYPE_CHECKING

from forescale.models.costs import MIXERS

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

Division = tuple[str, str]  # what is wrong, what to do


def divisions(config: "ModelConfig", ranks: int, columns: int) -> list[Division]:
    """Return why `ranks` can't divide rows of `columns` of this model; each (what, todo)."""
    whole = "write engine.sequence_parallel=1"
    found: list[Division] = []
    if columns % ranks:
        what = f"{ranks} ranks don't divide train.sequence_length={columns}"
        found.append((what, "choose a divisor of it"))
    if (heads := config.sized().num_heads or 1) % ranks:
        what = f"{ranks} ranks don't divide the model's {heads} heads"
        found.append((what, "choose a divisor of model.num_heads"))
    for name in config.mixers_used:
        if MIXERS[name].exchanged is None:
            what = f"mixer {name} carries a state from column to column, which no rank has whole"
            found.append((what, f"{whole}, or choose a mixer of attention"))
    if config.has_encoder:
        what = "an encoder-decoder has rows of two parts, which are not divided"
        found.append((what, f"{whole}, or model.encoder_layers=0"))
    if config.mtp_layers:
        what = "modules for later tokens read the next rank's columns"
        found.append((what, f"{whole}, or model.mtp_layers=0"))
    if config.has_experts:
        what = "the balance of experts is of all columns, and a rank has a part of them"
        found.append((what, f"{whole}, or choose another model.mlp"))
    return found
