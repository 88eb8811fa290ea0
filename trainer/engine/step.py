"""The engine: one model under DeepSpeed, and a training step with a stop before the update.

`backward` leaves the averaged gradient; `measure` returns its true norm (before clipping, before
Muon's orthogonalisation); then `apply` or `drop`. The stop holds at ZeRO stages 0 to 3 with AdamW
and Muon, with and without optimizer offload.

Invariant: what a micro-batch computes depends on the weights, the micro-batch and (seed, step,
index of the micro-batch, place among the ranks that divide its columns), so dropout is the same for
any number of groups and after any restart, and no random state has to be saved. Ranks that divide
matrices begin with the same state, and draw apart only what they have apart
(models/parallel/groups.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from forescale.engine.compilation import (
    compile_parts,
    fix_sizes,
    keep_to,
    probe_here,
    put_products_beside_exchanges,
    reuse_graphs,
)
from forescale.engine.determinism import set_compiler_mode
from forescale.engine.invariant import Grid, Sums
from forescale.engine.layer_norms import layer_norms
from forescale.engine.layout import Layout
from forescale.engine.parallel.experts import visible_to_deepspeed
from forescale.engine.parallel.pipeline import Pipeline
from forescale.engine.parallel.replicas import add_replicas
from forescale.engine.parallel.tensor import Mpu
from forescale.engine.stages import layout_of
from forescale.engine.world import World
from forescale.ground.errors import UserError
from forescale.models.adapters import stored_name
from forescale.models.parallel.whole import whole_of
from forescale.models.transformer import Transformer


@dataclass(frozen=True)
class Facts:
    """A step as this rank knows it.

    losses: sum of nats of each micro-batch, shape (n,); grad_norm: global; applied: False if the
    update was dropped. extra: further numbers by name, such as those of the model's `metrics()`
    (see train/model.py); world.share takes their mean over ranks with the rest. layer_norms: those
    of each layer's gradient, of all ranks, at the steps of `Engine.norms_at`.
    """

    losses: Tensor
    grad_norm: float
    applied: bool
    extra: dict[str, float | Tensor] = field(default_factory=dict)
    layer_norms: dict[str, float] = field(default_factory=dict)


def is_finite(loss: float, norm: float) -> bool:
    """True if a step's mean loss and gradient norm are finite: the least that must hold."""
    return math.isfinite(loss) and math.isfinite(norm)


class Engine:
    """`model` under ZeRO. `optimizer` holds its parameters, in groups that each have a "name" and
    a "peak_learning_rate". fp32_gradients: add up gradients of a lower precision in fp32.

    model: `forward(tokens_BL, targets_BL)` returns each window's summed loss in nats, shape (B,),
    or that and a scalar penalty; if documents are kept apart, it receives documents_BL too.
    Attributes: `module` is the model; `layout` says where its state is stored.
    """

    def __init__(
        self,
        world: World,
        model: nn.Module,
        optimizer,
        *,
        seed: int,
        clip: float | None,
        fp32_gradients: bool = False,
        invariant: bool = False,
        pipeline: Pipeline | None = None,
    ):
        self.world, self.seed, self.clip = world, seed, clip
        # At stage 0 in bf16, DeepSpeed makes a step while it is built; at rate 0 nothing moves.
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            group["peak_weight_decay"] = group.get("weight_decay", 0.0)
        with visible_to_deepspeed(model, optimizer.param_groups):
            self._deepspeed = _under_deepspeed(world, model, optimizer)
        self.module: nn.Module = self._deepspeed.module
        self.layout: Layout = layout_of(self._deepspeed, fp32_gradients)
        if invariant and (world.device.type == "cpu" or getattr(self.layout, "offload", False)):
            # On a CPU the fused AdamW rounds the last elements of a tensor in another way.
            for group in self.layout.base.param_groups:
                if "fused" in group:
                    group["fused"] = False
        if world.replicas.size > 1 and isinstance(self.module, Transformer):  # none unused
            self.layout.add_beside(world.replicas)
        self.pipeline = pipeline
        if pipeline is not None:
            self.layout.reduce_later()
            pipeline.open(self.module, fp32_gradients)
        if world.tensor.size > 1:
            self.layout.divided_among(world.tensor)
        if not world.tensor.is_main:  # what is not divided, the first rank of the group has too
            self.layout.counts = lambda param: whole_of(param).parts > 1
        self.grid: Grid | None = None
        if invariant:
            self.layout.sum_over(world.shard.size)
            self.grid = Grid(self.module.parameters(), world.device)
        named = self.module.named_parameters()
        self.names: dict[nn.Parameter, str] = {p: stored_name(n) for n, p in named}
        self.shapes, self.buffer_shapes = self._shapes()
        self.mark: Callable[[str], None] = lambda at: None  # receives the place inside a step
        # For injected faults: may damage the weights before a step, given its number, and returns
        # a factor for its gradient.
        self.disturb: Callable[[int, nn.Module], float] | None = None
        self.norms_at: Callable[[int], bool] = lambda step: False  # on all ranks alike
        # None: a row is a window. Else a function of the row losses of a micro-batch, its penalty
        # and the micro-batch: it returns the window losses, (B,), the penalty, and numbers to log.
        self.combine: Callable[..., tuple[Tensor, Any, dict[str, Tensor]]] | None = None
        self.outer: Any = None  # engine.outer.OuterState, of a run on several clusters
        self._numbers: dict[str, list[Tensor]] = {}  # of the step's micro-batches
        self._share = 1.0  # of these, this rank's, times the ranks
        self.has_stepped = False  # True once this process has made a step

    def _shapes(self) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
        """Return the shapes of parameters and of persistent buffers, by name: of those that ranks
        divide the whole, and of those on other stages too."""
        params = {name: whole_of(param).shape for param, name in self.names.items()}
        persistent = self.module.state_dict(keep_vars=True)
        buffers = {n: b.shape for n, b in self.module.named_buffers() if n in persistent}
        every = self.world.pipeline.gather([params, buffers])
        all_params, all_buffers = (
            {name: tuple(shape) for stage in every for name, shape in stage[kind].items()}
            for kind in range(2)
        )
        return all_params, all_buffers

    @property
    def param_groups(self) -> list[dict]:
        """The base optimizer's groups, as DeepSpeed keeps them."""
        return self.layout.base.param_groups

    def compile(
        self, by_part: bool = True, budget: float | None = None, backend: str = "inductor"
    ) -> None:
        """Compile the model's forward (and so its backward) in place: each of its parts alone, or
        the model as a whole. budget: see compilation.keep_to; backend: of torch.compile."""
        set_compiler_mode()
        fix_sizes()
        keep_to(budget)
        reuse_graphs()
        probe_here()
        if self.world.mesh.exchanges:
            put_products_beside_exchanges()
        if not (by_part and compile_parts(self.module, backend)):
            self._deepspeed.compile(backend=backend)

    def train_step(
        self,
        batch,
        multiplier: float,
        may_apply: Callable[[float, float], bool] = is_finite,
        before_update: Callable[[Any, Tensor], None] | None = None,
        decay: float = 1.0,
    ) -> Facts:
        """Make one optimizer step over this rank's micro-batches of `batch` (a data.stream.Batch).

        multiplier: of every group's peak learning rate; decay: of its weight decay. may_apply:
        called on every rank with the step's mean loss and gradient norm; the weights are updated if
        it returns True, as it must on all ranks alike. before_update: receives the batch and the
        losses before the update.
        """
        losses, loss, norm, again = self._gradient(batch)
        extra = self.metrics()
        if self.grid:
            extra["recomputed"] = float(again)
        if before_update is not None:
            before_update(batch, losses)
        is_due = self.norms_at(batch.step + 1) and math.isfinite(norm)
        norms = layer_norms(self) if is_due else {}
        # In fp16, with a loss scale to lower, DeepSpeed handles an overflow, and skips the update.
        is_scaled = self._deepspeed.fp16_enabled() and self.layout.loss_scale != 1.0
        overflowed = is_scaled and not math.isfinite(norm)
        if not overflowed and not may_apply(loss, norm):
            self.drop()
            return Facts(losses, norm, False, extra, norms)
        clipped = self.clip is not None and norm > self.clip
        self.mark("update")
        applied = self.apply(multiplier, self.clip / norm if clipped and self.clip else 1.0, decay)
        if applied and self._counters() is not None:
            self.module.updated()  # type: ignore[operator]
        self.has_stepped = True
        return Facts(losses, norm, applied, extra, norms)

    def _gradient(self, batch) -> tuple[Tensor, float, float, int]:
        """Make the step's gradient. Return the losses of `backward`, what `measure` returns, and
        how often it was computed again, because it was too large for the units of `grid`."""
        again = 0
        disturbance = self.disturb(batch.step + 1, self.module) if self.disturb else 1.0
        while True:
            losses = self.backward(batch, disturbance)
            self.mark("norm")
            if self.grid is None:
                return losses, *self.measure(losses, batch.targets), 0
            sums = self._sums(losses, batch, self.grid)
            if sums.fits:
                break
            self.drop()
            again += 1
        if (counters := self._counters()) is not None:
            self.module.counted(self.world.sum(counters.long()))  # type: ignore[operator]
        self.layout.norm = sums.norm
        return losses, sum(sums.losses) / batch.targets, sums.norm, again

    @torch.no_grad()
    def _sums(self, losses: Tensor, batch, grid: Grid) -> Sums:
        columns = self.world.columns  # each of these ranks has losses of its own of a micro-batch
        first, end = (batch.micro[0].index + n for n in (0, len(losses)))
        slots = slice(first * columns.size + columns.rank, end * columns.size, columns.size)
        count = batch.micro_batches * columns.size
        # At stage 0 each of the ranks with the same parameters has the whole gradient of these.
        alike = self.world.states if self.layout.replicated else self.world.replicas
        parts = self.layout.parts() if alike.is_main else ()
        return grid.sums(parts, losses, slots, count, self.world)

    def backward(self, batch, disturbance: float = 1.0) -> Tensor:
        """Accumulate the gradient of the step's mean loss per target. Return the summed loss of
        each micro-batch, fp32 of shape (n,): 0 where another rank has the same, so that all ranks'
        sum is that of the step. disturbance: a factor of the gradient, see `disturb`."""
        self.layout.norm = None
        if not isinstance(self.module, Transformer):
            self.layout.forget()
        if not self.module.training:
            self.module.train()
        # DeepSpeed averages over the ranks that it divides states among; the step's loss is a sum
        # over its targets on all ranks.
        ranks = 1 if self.grid else self.world.shard.size
        scale = ranks / batch.targets * self.layout.backward_scale * disturbance
        if self.grid:
            self.grid.begin(batch.micro_batches * self.world.columns.size)
        if (counters := self._counters()) is not None:
            counters.zero_()
        losses = []
        self._numbers = {}
        self._share = len(batch.micro) * self.world.data.size / batch.micro_batches
        rounds = -(-batch.micro_batches // self.world.data.size)
        if self.pipeline is not None:
            seed = partial(self.seed_for, batch.step)
            nats = self.pipeline.backward(batch.micro, scale, seed, self.mark)
            self.mark("norm")
            self.layout.reduce()
            self._add_replicas()
            return nats if self.world.tensor.is_main else torch.zeros_like(nats)
        for i in range(rounds):
            micro = batch.micro[min(i, len(batch.micro) - 1)]
            # Some ranks may have a micro-batch less: all take part in the same collectives, so
            # these compute their last one again, whose gradient then is 0.
            is_padding = i == len(batch.micro)
            before = counters.clone() if is_padding and counters is not None else None
            self.seed_for(batch.step, micro.index)
            self._deepspeed.set_gradient_accumulation_boundary(i == rounds - 1)
            self.mark("forward")
            loss, penalty, numbers = self.combined(self.forward(micro), micro)
            total = loss.sum()
            self.mark("backward")
            factor = 0.0 if is_padding else scale
            self._deepspeed.backward((total + penalty) * factor, scale_wrt_gas=False)
            if is_padding:
                if counters is not None and before is not None:
                    counters.copy_(before)
                break
            for name, each in numbers.items():
                self._numbers.setdefault(name, []).append(each.mean())
            nats = total.detach().float()
            losses.append(nats if self.world.tensor.is_main else torch.zeros_like(nats))
        self._add_replicas()
        return torch.stack(losses)

    def _add_replicas(self) -> None:
        if self.world.replicas.size > 1 and not self.layout.adds_beside:
            add_replicas(self.layout.reduced(), self.world.replicas, self.layout.bucket_size)

    def combined(self, output: Any, micro: Any) -> tuple[Tensor, Tensor | float, dict[str, Tensor]]:
        """Return the window losses of a micro-batch, (B,), its penalty, and numbers to log. output:
        what the model returned for it."""
        rows, penalty = checked_losses(output, len(micro.tokens))
        return (rows, penalty, {}) if self.combine is None else self.combine(rows, penalty, micro)

    def _counters(self) -> Tensor | None:
        """Return the model's own `counters()`; None without such a method."""
        counters = getattr(type(self.module), "counters", None)
        return None if counters is None else counters(self.module)

    def metrics(self) -> dict[str, float | Tensor]:
        """Return the numbers of the model's own `metrics()`, detached, and the means of those of
        `combine`; none where there is neither.

        Raises UserError if one isn't a number or a tensor of one element.
        """
        metrics = getattr(type(self.module), "metrics", None)
        numbers = {} if metrics is None else metrics(self.module)
        means: dict[str, float | Tensor] = {
            name: torch.stack(each).mean() * self._share for name, each in self._numbers.items()
        }
        for name, value in numbers.items():
            if isinstance(value, Tensor) and value.numel() == 1:
                # A copy: the update comes before it is shared.
                means[name] = value.detach().reshape(()).clone()
            elif isinstance(value, int | float):
                means[name] = float(value)
            else:
                problem = f"returns {name!r} as {type(value).__name__}, which is not one number"
                todo = "return floats or tensors of one element"
                raise UserError("the model's metrics()", problem, todo)
        return means

    def seed_for(self, step: int, micro_batch: int, part: int = 0) -> None:
        """Set the random state for a micro-batch, or for this rank's columns of it; in a pipeline,
        for a part of the model, so that with dropout it draws other numbers than one rank.

        As `torch.manual_seed` does, but for the devices that exist: torch's own inspects the Python
        stack for every other kind of device, which takes up to a millisecond.
        """
        value = _mix(self.seed, step, micro_batch, self.world.columns.rank + (part << 32))
        torch.default_generator.manual_seed(value)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(value)

    def forward(self, micro):
        """Return the model's output for a micro-batch (a data.stream.MicroBatch)."""
        positional, named = micro.arguments(self.world.device)
        return self._deepspeed(*positional, **named)

    def measure(self, losses: Tensor, targets: int) -> tuple[float, float]:
        """Return the step's mean loss per target and the global L2 norm of the averaged gradient,
        after one all-reduce of two numbers, and of the model's counters, whose sums the model then
        receives.

        They are not finite if a loss or gradient isn't. In fp16 the loss scale is divided out.
        """
        counters = self._counters()
        with torch.no_grad():
            square = torch.zeros((), dtype=torch.float64, device=self.world.device)
            if self.world.replicas.is_main:
                square = self.layout.square_sum(self.world.device, self.world.mesh.in_stage)
            pair = torch.stack([square, losses.sum().to(self.world.device, torch.float64)])
        if counters is not None:  # fp64 holds integers up to 2^53
            pair = torch.cat([pair, counters.flatten().double()])
        sums = self.world.sum(pair)
        if counters is not None:
            self.module.counted(sums[2:].long().view_as(counters))  # type: ignore[operator]
        square_sum, loss_sum = sums[:2].tolist()
        norm = self.layout.norm = math.sqrt(square_sum)
        return loss_sum / targets, norm / self.layout.loss_scale

    def apply(self, multiplier: float, factor: float = 1.0, decay: float = 1.0) -> bool:
        """Update the weights. factor: multiplies the gradient (clipping). Return False if
        DeepSpeed's fp16 loss scaler skipped the update."""
        for group in self.param_groups:
            group["lr"] = group["peak_learning_rate"] * multiplier
            group["weight_decay"] = group["peak_weight_decay"] * decay
        with torch.no_grad():
            self.layout.prepare_step(factor)
        self._deepspeed.step()
        self.weights_changed()
        return not getattr(self.layout.optimizer, "overflow", False)

    def weights_changed(self) -> None:
        """Must be called where weights are changed: other stages may borrow some."""
        if self.pipeline is not None:
            self.pipeline.is_stale = True

    def drop(self) -> None:
        """Discard the gradient. Weights, moments and Muon's momentum stay as they are."""
        self.layout.discard()

    @torch.no_grad()
    def losses(self, micro, everywhere: bool = True) -> Tensor:
        """Return the summed nats of each row of a micro-batch, fp32 of shape (B,), without dropout
        or gradient. everywhere: in each stage of a pipeline; else in the last one alone, and 0 in
        the others, which then don't wait for it.

        At stage 3 every rank must call it the same number of times: it gathers weights. So must the
        ranks that divide experts: they exchange rows.
        """
        self.module.eval()
        if self.pipeline is not None:
            loss = self.pipeline.losses(micro, everywhere)
        else:
            loss, _ = checked_losses(self.forward(micro), len(micro.tokens))
        if self.world.columns.size > 1:  # this rank has those of its own columns
            loss = self.world.columns.sum(loss.double())
        return loss.float()

    @torch.no_grad()
    def logits(self, tokens_BL: Tensor) -> Tensor:
        """Return the logits of rows of tokens, (B, L, V), without dropout; where ranks divide a
        row, those of this rank's columns. All ranks must call it the same number of times, as with
        `losses`.

        It isn't compiled: rows of another length would make the compiler give up the fixed sizes
        of the training's graphs, and so change their last bits.
        """
        self.module.eval()
        with torch.compiler.set_stance("force_eager"):
            logits_BLV: Tensor = self._deepspeed(tokens_BL.to(self.world.device))
        return logits_BLV


def _under_deepspeed(world: World, model: nn.Module, optimizer: Any) -> Any:
    import deepspeed

    deepspeed.utils.groups.mpu = None  # left by an earlier engine of this process
    if world.shard is world:
        return world.accelerator.prepare(model, optimizer)[0]
    # Accelerate hands over no Mpu, except for models of transformers.
    config = world.accelerator.state.deepspeed_plugin.deepspeed_config
    arguments = {"model": model, "optimizer": optimizer, "config_params": config}
    return deepspeed.initialize(**arguments, mpu=Mpu(world))[0]


def checked_losses(
    output, windows: int, where: str = "the model's forward()"
) -> tuple[Tensor, Tensor | float]:
    """Return a model's losses for `windows` windows, and its penalty, 0.0 if it returns none.
    Raises UserError, which names `where`, if the losses are not one number a window, or the penalty
    is not one number."""
    loss, penalty = output if isinstance(output, tuple) and len(output) == 2 else (output, 0.0)
    todo = "return each window's summed loss in nats, or that and a penalty of one number"
    if not isinstance(loss, Tensor) or tuple(loss.shape) != (windows,):
        got = (
            f"a loss of shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else type(loss).__name__
        )
        problem = f"with targets it returns {got} for {windows} windows, not ({windows},)"
        raise UserError(where, problem, todo)
    if isinstance(penalty, Tensor) and penalty.numel() != 1:
        raise UserError(where, f"its penalty has the shape {tuple(penalty.shape)}", todo)
    return loss, penalty


def _mix(seed: int, step: int, index: int, place: int) -> int:
    """Return a 63-bit seed from four numbers (splitmix64's finaliser over their sum of odd
    multiples)."""
    x = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB
    x = (x + place * 0xD6E8FEB86659FD93) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) >> 1
