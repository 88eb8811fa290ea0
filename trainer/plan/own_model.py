"""The parameters and FLOPs of a model that is a class of the user's own.

Invariant: the only file of the plan that loads torch, and only when it is called.
"""

from forescale.plan.bytes.parameters import Inventory, Parameter, inventory
from forescale.plan.config import PlanJob
from forescale.plan.step_time import TokenFlops


def own_model(job: PlanJob, vocab_size: int) -> tuple[Inventory, TokenFlops]:
    """Return parameters and FLOPs of a model, built without values.

    Raises UserError if it can't be built.
    """
    import torch

    from forescale.train.model import build_model, prices_of
    from forescale.train.probe import examine_model

    examine_model(job, vocab_size)
    with torch.device("meta"):
        model = build_model(job, vocab_size)
    every = [Parameter(n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad]
    names = getattr(model, "muon_parameters", None)
    prices = prices_of(job, model)
    parameters = inventory(job, every, names() if names else None)
    return parameters, TokenFlops(
        prices["full"], prices["causal"], prices["six_n"], prices["full"] / 3
    )
