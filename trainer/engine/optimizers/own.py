"""An optimizer class of the user's own, given by optimizer._target_.

It is built as `Class(groups, lr=1.0, **optimizer.arguments)`. The class must update each element
independently (ZeRO cuts parameters into flat parts; train/probe.py tries it), read "lr" and
"weight_decay" from its groups at each step, and keep its state in self.state[p]: tensors of p's
shape are saved and restored by their names.
"""

import torch

from forescale.config.sections.optimizer import OwnOptimizerConfig
from forescale.config.target import import_target
from forescale.ground.errors import UserError


def build(config: OwnOptimizerConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """Return the user's optimizer over `groups`.

    Raises UserError if the class can't be imported or built, or is not an optimizer.
    """
    where = f"optimizer._target_={config.target}"
    cls = import_target("optimizer._target_", config.target)
    try:
        optimizer = cls(groups, lr=1.0, **config.arguments)
    except (TypeError, ValueError) as e:
        todo = "check optimizer.arguments"
        raise UserError(where, f"the class can't be built ({e})", todo) from e
    if not isinstance(optimizer, torch.optim.Optimizer):
        problem = f"this builds a {type(optimizer).__name__}, which is not an optimizer"
        raise UserError(where, problem, "set it to a subclass of torch.optim.Optimizer")
    return optimizer
