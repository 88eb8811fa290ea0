"""Puts the adapters of a job into a model that is being built, and freezes all else.

The adapters are those of the library peft, in the place of our modules (models/adapters.py has
their names and costs). Invariant: what they begin with depends on the seed alone, and not on the
stage or the ranks; B is 0, so the model begins as it was.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from forescale.config.train import TrainJob
from forescale.errors import UserError
from forescale.models.adapters import is_adapter, is_target, stored_name
from forescale.models.block import Block
from forescale.models.init import Linear

Division = Callable[[nn.Module], nn.Module]


def adapting(job: TrainJob, divide: Division | None) -> Division | None:
    """Return what puts adapters into a block that has its weights, freezes any large part of a
    model, and then does `divide`; that alone if the job has none.

    So ranks that divide the parts divide the adapters too. Raises UserError without peft.
    """
    lora = job.lora
    if not lora.rank:
        return divide
    peft = _peft()
    seed = job.train.seed if job.train.init_seed is None else job.train.init_seed
    draws = torch.Generator().manual_seed(seed)
    settings = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}

    def adapted(module: nn.Module) -> nn.Module:
        module.requires_grad_(False)
        if isinstance(module, Block):
            inside = (n for n, part in module.named_modules() if isinstance(part, Linear))
            if names := [name for name in inside if is_target(name, lora.targets)]:
                config = peft.LoraConfig(**settings, target_modules=names)
                with torch.random.fork_rng(devices=[]):  # later blocks draw as without adapters
                    peft.inject_adapter_in_model(config, module)
                _draw(module, draws)
        return divide(module) if divide else module

    return adapted


def freeze(job: TrainJob, model: nn.Module) -> None:
    """Freeze what is no adapter, if the job has some: what is in no large part, such as norms.

    At stage 3 the first block's input gets a gradient, though nothing needs it: DeepSpeed sees by
    it that the block's backward pass is over, and else takes away its weights before.
    """
    if not job.lora.rank:
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(stored_name(name)))
    if job.engine.stage == 3:
        model.dropout.register_forward_hook(_with_gradient)  # type: ignore[union-attr]


def _with_gradient(module: nn.Module, args: Any, x_BLD: Tensor) -> Tensor:
    return x_BLD.requires_grad_() if torch.is_grad_enabled() else x_BLD


@torch.no_grad()
def _draw(block: nn.Module, draws: torch.Generator) -> None:
    """Set the A of each adapter, as peft does: uniform, within 1 / sqrt(inputs)."""
    for name, parameter in block.named_parameters():
        if ".lora_A." in name:
            # Drawn here, for the model may be in a context without draws (models.init.Undrawn).
            unit = torch.rand(parameter.shape, generator=draws)
            parameter.copy_((2 * unit - 1) / parameter.shape[1] ** 0.5)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        problem = "needs the package peft, which is not installed"
        raise UserError("lora.rank", problem, "pip install 'forescale[lora]'") from None
    return peft
