"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), as implemented by DeepSpeed.

It updates the hidden matrices; torch's fused AdamW updates all other parameters.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

from forescale.config.sections.optimizer import MuonConfig
from forescale.engine.optimizers.orthogonal import MuonUpdate


def build(config: MuonConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """Return DeepSpeed's Muon, with torch's AdamW for the other parameters.

    If DeepSpeed built Muon from its JSON, it would compile its own FusedAdam, which takes half a
    minute and needs a compiler. On a CPU the iterations use bf16 (ns_method "standard"); "gram"
    uses fp16 if the device supports it. Those of a job in fp32 use fp32.
    """
    adam = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    method = "gram" if torch.cuda.is_available() else "standard"
    for group in groups:
        group["lr"] = group["peak_learning_rate"]
        if group["use_muon"]:
            group |= {"momentum": config.momentum, "ns_method": method}
        else:
            group |= adam | group  # the group's own eps has precedence
        for p in group["params"]:
            p.use_muon = group["use_muon"]

    def auxiliary(aux_groups: list[dict], **_) -> torch.optim.Optimizer:
        return torch.optim.AdamW(aux_groups, fused=True)

    return _class()(groups, adam_optimizer=auxiliary)


@cache
def _class() -> Any:
    """Return DeepSpeed's class, of which the updates of whole matrices are computed together."""

    class Muon(import_muon()):  # type: ignore[misc]
        param_groups: list[dict[str, Any]]

        @torch.no_grad()
        def step(self, closure: Any = None, step_id: Any = None) -> Any:
            """Update all parameters. Flat partitions have their updates as gradients (stages.py);
            matrices are whole at stage 0."""
            from deepspeed.runtime.zero.muon.original_muon import muon_update

            groups = self.param_groups
            whole: list[dict[str, Any]] = []
            others: list[dict[str, Any]] = []
            for group in groups:
                is_whole = group["use_muon"] and any(p.ndim > 1 for p in group["params"])
                (whole if is_whole else others).append(group)
            with together():
                for group in whole:
                    options = {"beta": group["momentum"], "ns_method": group["ns_method"]}
                    for p in group["params"]:
                        state = self.state[p]
                        if not state:
                            state["momentum_buffer"] = torch.zeros_like(p)
                        gradient = torch.zeros_like(p) if p.grad is None else p.grad
                        p.grad = muon_update(gradient, state["momentum_buffer"], **options)
            for group in whole:
                updates = [p.grad.view_as(p) for p in group["params"]]
                torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(group["params"], updates, alpha=-group["lr"])
            self.param_groups = others
            try:
                return super().step(closure, step_id)
            finally:
                self.param_groups = groups

    return Muon


@cache
def import_muon() -> Any:
    """Return DeepSpeed's Muon class without compilation, and with our update (orthogonal.py).

    On import it wraps its iterations in torch.compile, once per shape. On a CPU this takes half a
    minute at the first step, and the compiled iterations are not faster than eager ones. To wrap
    them alone imports the whole compiler, 1.5 s of each rank, and DeepSpeed imports this module to
    look at any optimizer: so it has to be imported here first.
    """
    from deepspeed.runtime import compiler

    decorator, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
    finally:
        compiler.compile = decorator
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    # Two names: stage 0 calls it by the first, the others import it by the second at each update.
    muon_optimizer.muon_update = original_muon.muon_update = _update()
    return MuonWithAuxAdam


@cache
def _update() -> MuonUpdate:
    """Return what replaces DeepSpeed's own update, which it is made with."""
    from deepspeed.runtime.zero.muon import original_muon

    return MuonUpdate(original_muon.muon_update)


def together() -> AbstractContextManager[None]:
    """Return a context in which Muon's updates of one shape are computed together; their values are
    there after it."""
    import_muon()
    return _update().together()


def use_precision(kind: str) -> None:
    """Make Muon's iterations use fp32 in a job of precision "fp32", else what DeepSpeed chooses.

    On a CPU that is bf16: DeepSpeed asks whether torch has the type, not whether the CPU has
    instructions for it, and where it has none, bf16 is 100 times slower than fp32.
    """
    import_muon()
    from deepspeed.runtime.zero.muon import original_muon

    original = _dtype_of_deepspeed()
    original_muon.ns_compute_dtype = (lambda method: torch.float32) if kind == "fp32" else original


@cache
def _dtype_of_deepspeed() -> Callable[[str], torch.dtype]:
    """Return DeepSpeed's own function, as it was before it was ever replaced."""
    from deepspeed.runtime.zero.muon import original_muon

    return original_muon.ns_compute_dtype
