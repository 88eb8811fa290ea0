"""Optimizers of torch in a process that compiles nothing: they import no compiler.

Invariant: what an optimizer computes stays the same, to the bit.
"""

import sys

import torch

_METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def without_compiler() -> None:
    """Let the optimizers of this process do without torch's compiler, before the first is made.

    torch wraps their methods so that its compiler leaves them alone, and each wrapper imports the
    compiler to say so: 1.3 s of each rank. Where torch no longer wraps one, nothing is changed.
    """
    if "torch._dynamo" in sys.modules:
        return  # nothing to gain
    optimizer, adam = torch.optim.Optimizer, torch.optim.Adam  # its step is AdamW's too
    for owner, name in [*((optimizer, name) for name in _METHODS), (adam, "step")]:
        if plain := getattr(getattr(owner, name), "__wrapped__", None):
            # The wrapper of `step` also turned gradients off.
            setattr(owner, name, torch.no_grad()(plain) if name == "step" else plain)
