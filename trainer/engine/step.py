"""The engine: one model under DeepSpeed, and a training step with a stop before the update.

`backward` leaves the averaged gradient; `gradient_norm` is its true norm (before clipping, before
Muon's orthogonalisation); then `apply` or `drop`. The stop holds at ZeRO stages 0 to 3 with AdamW
and Muon, with and without optimizer offload.

Invariant: what a micro-batch computes depends on the weights, the micro-batch and (seed, step,
index of the micro-batch), so dropout is the same at any world size and after any restart, and no
random state has to be saved.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forescale.engine.layout import Layout, fp32_square_sum, layout_of
from forescale.engine.world import World


@dataclass(frozen=True)
class Facts:
    """Of one step on this rank. losses: sum of nats a micro-batch, shape (n,); grad_norm: global;
    applied: False where the update was dropped."""

    losses: Tensor
    grad_norm: float
    applied: bool


def is_finite(loss: float, norm: float) -> bool:
    """The least that must hold of a step: its mean loss and gradient norm are numbers."""
    return math.isfinite(loss) and math.isfinite(norm)


class Engine:
    """`model` under ZeRO. Its parameters are `optimizer`'s, in groups with a "name" and a
    "peak_learning_rate" each.

    model: `forward(tokens_BL, targets_BL)` returns each window's summed loss in nats, shape (B,),
    or that and a scalar penalty; where documents are kept apart it is given documents_BL too.
    Attributes: `module` the model, `layout` where its state lies.
    """

    def __init__(self, world: World, model: nn.Module, optimizer, *, seed: int, clip: float | None):
        self.world, self.seed, self.clip = world, seed, clip
        # Stage 0 in bf16 steps once while it is built: with a zero rate, nothing moves.
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self._deepspeed, _ = world.accelerator.prepare(model, optimizer)
        self.module: nn.Module = self._deepspeed.module
        self.layout: Layout = layout_of(self._deepspeed)
        self.names: dict[nn.Parameter, str] = {p: n for n, p in self.module.named_parameters()}
        self.mark: Callable[[str], None] = lambda at: None  # hears where inside a step the rank is
        # May spoil the weights before a step, by its number, and give a factor for its gradient.
        self.disturb: Callable[[int, nn.Module], float] | None = None

    @property
    def param_groups(self) -> list[dict]:
        """The base optimizer's groups, as DeepSpeed keeps them."""
        return self.layout.base.param_groups

    def compile(self) -> None:
        """Compile the model's forward (and so its backward) in place."""
        self._deepspeed.compile()

    def train_step(
        self,
        batch,
        multiplier: float,
        may_apply: Callable[[float, float], bool] = is_finite,
        before_update: Callable[[Any, Tensor], None] | None = None,
    ) -> Facts:
        """One optimizer step over this rank's micro-batches of `batch` (a data.stream.Batch).

        multiplier: of every group's peak learning rate. may_apply: asked on every rank alike, with
        the step's mean loss and gradient norm, whether the weights are updated. before_update: gets
        the batch and the losses while the weights are still those that made them.
        """
        losses = self.backward(batch)
        self.mark("norm")
        loss, norm = self.measure(losses, batch.targets)
        if before_update is not None:
            before_update(batch, losses)
        # In fp16 an overflow is DeepSpeed's to handle: it lowers the scale and skips the update.
        scaled = self.layout.loss_scale != 1.0 and not math.isfinite(norm)
        if not scaled and not may_apply(loss, norm):
            self.drop()
            return Facts(losses, norm, False)
        clipped = self.clip is not None and norm > self.clip
        self.mark("update")
        applied = self.apply(multiplier, self.clip / norm if clipped and self.clip else 1.0)
        return Facts(losses, norm, applied)

    def backward(self, batch) -> Tensor:
        """Accumulate the gradient of the step's mean loss per target; returns the micro-batches'
        summed losses, fp32 of shape (n,)."""
        if not self.module.training:
            self.module.train()
        # DeepSpeed averages over ranks; the step's loss is a sum over its targets on all ranks.
        scale = self.world.size / batch.targets * self.layout.backward_scale
        if self.disturb is not None:
            scale *= self.disturb(batch.step + 1, self.module)
        losses = []
        for micro in batch.micro:
            self.seed_for(batch.step, micro.index)
            last = micro is batch.micro[-1]
            self._deepspeed.set_gradient_accumulation_boundary(last)
            self.mark("forward")
            loss, penalty = split_penalty(self.forward(micro))
            total = loss.sum()
            self.mark("backward")
            self._deepspeed.backward((total + penalty) * scale, scale_wrt_gas=False)
            losses.append(total.detach().float())
        return torch.stack(losses)

    def seed_for(self, step: int, micro_batch: int) -> None:
        """Set the random state that a micro-batch is computed with."""
        _seed(_mix(self.seed, step, micro_batch))

    def forward(self, micro):
        """The model's output for a micro-batch (a data.stream.MicroBatch)."""
        positional, named = micro.arguments(self.world.device)
        return self._deepspeed(*positional, **named)

    def gradient_norm(self) -> float:
        """The global L2 norm of the averaged gradient, as `measure` gives it."""
        return self.measure(torch.zeros(1), 1)[1]

    def measure(self, losses: Tensor, targets: int) -> tuple[float, float]:
        """The step's mean loss per target and the global L2 norm of the averaged gradient: one
        all-reduce of two numbers.

        Not finite where a loss or gradient isn't. In fp16 the loss scale is divided out.
        """
        with torch.no_grad():
            square = fp32_square_sum(self.layout.gradients(), self.world.device).double()
            pair = torch.stack([square, losses.sum().to(self.world.device, torch.float64)])
        if self.layout.replicated:
            pair[0] /= self.world.size  # every rank has all of the gradient
        square_sum, loss_sum = self.world.sum(pair).tolist()
        return loss_sum / targets, math.sqrt(square_sum) / self.layout.loss_scale

    def apply(self, multiplier: float, factor: float = 1.0) -> bool:
        """Update the weights. factor: multiplies the gradient (clipping). Returns False where
        DeepSpeed's fp16 loss scaler skipped the update."""
        for group in self.param_groups:
            group["lr"] = group["peak_learning_rate"] * multiplier
        with torch.no_grad():
            self.layout.prepare_step(factor)
        self._deepspeed.step()
        return not getattr(self.layout.optimizer, "overflow", False)

    def drop(self) -> None:
        """Forget the gradient: weights, moments and Muon's momentum stay as they are."""
        self.layout.discard()

    @torch.no_grad()
    def losses(self, micro) -> Tensor:
        """Summed nats of each window of a micro-batch, fp32 of shape (B,), without dropout or
        gradient.

        At stage 3 every rank must call it equally often: weights are gathered as it runs.
        """
        self.module.eval()
        loss, _ = split_penalty(self.forward(micro))
        return loss.float()


def split_penalty(output) -> tuple[Tensor, Tensor | float]:
    """A model's losses and its penalty (0.0 where it returns none)."""
    return output if isinstance(output, tuple) else (output, 0.0)


def _seed(value: int) -> None:
    """What `torch.manual_seed` does for the devices there are. That one looks at the Python stack
    for every other kind of device, which costs up to a millisecond."""
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)


def _mix(seed: int, step: int, index: int) -> int:
    """A 63-bit seed from three numbers (splitmix64's finaliser over their sum of odd multiples)."""
    x = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) >> 1


def build_optimizer(kind: str, groups: list[dict], **settings) -> torch.optim.Optimizer:
    """AdamW, or DeepSpeed's Muon with AdamW for the groups that aren't `use_muon`.

    groups: dicts with "params", "name", "peak_learning_rate", "weight_decay", "use_muon".
    settings: betas, eps, momentum. The class is DeepSpeed's own and its auxiliary half torch's: a
    config-made Muon compiles FusedAdam (half a minute, and nothing without a compiler). On a CPU
    it iterates in bf16 ("standard"), which every CPU does alike; "gram" takes fp16 where there is
    some.
    """
    adam = {"betas": settings["betas"], "eps": settings["eps"]}
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=1.0, fused=True, **adam)
    muon = _import_muon()
    method = "gram" if torch.cuda.is_available() else "standard"
    for group in groups:
        group["lr"] = group["peak_learning_rate"]
        if group["use_muon"]:
            group |= {"momentum": settings["momentum"], "ns_method": method}
        else:
            group |= adam | group  # its own eps, where it has one
        for p in group["params"]:
            p.use_muon = group["use_muon"]

    def auxiliary(aux_groups: list[dict], **_) -> torch.optim.Optimizer:
        return torch.optim.AdamW(aux_groups, fused=True)

    return muon(groups, adam_optimizer=auxiliary)


def _import_muon() -> Any:
    """DeepSpeed's Muon, not compiled. It compiles itself while it is imported, once a shape: half a
    minute at the first step of a CPU, for iterations that are no faster than eager ones there."""
    from deepspeed.runtime import compiler

    decorator, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
    finally:
        compiler.compile = decorator
    return MuonWithAuxAdam
