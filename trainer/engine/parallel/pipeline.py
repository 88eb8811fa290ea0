"""Pipeline parallelism: stages of ranks, each with some successive blocks of the model (Huang et
al. 2019, GPipe, arXiv 1811.06965), through which several micro-batches pass at once.

A rank sends the residual stream to the rank at its place in the next stage, and the stream's
gradient back, in the order of schedules.py. All ranks at a place read the same windows, so tokens,
documents and masks are not sent. Nor are penalties: their sum has a known gradient, so each stage
adds its own to its backward pass.

DeepSpeed's own pipeline wants its own modules and reads its own batches; it is used as that
pipeline uses it: the backward passes are torch's, add up in `.grad`, and are reduced at the end of
a step (Layout.reduce_later). ZeRO divides the states inside of a stage, at stages 0 and 1.

A table that several stages read (tied, of later tokens, of relative positions) is trained on the
first alone. The others borrow it: they receive it when it has changed, and send their gradient of
it back after their last micro-batch. So it counts once, in the norm and in checkpoints, and no two
copies can come apart.

Invariant: the gradients are those of one rank; a micro-batch that passes has its own arguments and
its own seed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.engine.parallel.schedules import order_of
from forescale.engine.world import World
from forescale.models.block import ResidualStream
from forescale.models.init import Linear
from forescale.models.transformer import Absent, Transformer

_SHARED = ("embedding", "bigrams", "relative_position")  # what several stages may read

_MOST_SENT = 8  # tensors under way from a rank
Key = tuple[str, int, int]  # F or B, part, micro-batch


def borrow(model: nn.Module) -> None:
    """Take the tables that a stage borrows out of the parameters that it trains."""
    assert isinstance(model, Transformer)
    assert model.stage is not None
    for module, name in _shared(model):
        if model.stage.borrows(name):
            for inner, p in [*module.named_parameters()]:
                delattr(module, inner)
                setattr(module, inner, p.detach().requires_grad_())


def _shared(model: Transformer) -> Iterator[tuple[nn.Module, str]]:
    for name in _SHARED:
        module = getattr(model, name)
        if module is not None and not isinstance(module, Absent):
            yield module, name


class _WeightLater(torch.autograd.Function):
    """x (..., in), weight (out, in) -> (..., out): linear. The backward pass gives the gradient of
    x alone, and notes what that of the weight is made of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, pipeline: "Pipeline") -> Tensor:
        ctx.save_for_backward(x)
        # Not saved: where activations are made again, that would return another tensor.
        ctx.weight, ctx.pipeline = weight, pipeline
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.pipeline.later.append((ctx.weight, x, gradient))
        return gradient @ ctx.weight, None, None


class Pipeline:
    """This rank's stage. It is stale while a borrowed table may be older than the lender's."""

    def __init__(self, world: World, schedule: str, model: nn.Module):
        assert isinstance(model, Transformer)
        assert model.stage is not None
        self.ranks, self.device, self.stage = world.pipeline, world.device, model.stage
        self.schedule, self.last = schedule, model.stage.division.last
        self.is_stale = True
        self._sent: list[tuple[Any, Tensor]] = []
        self.later: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # of _WeightLater

    @property
    def is_last(self) -> bool:
        """True for the stage with the losses."""
        return self.ranks.rank == self.ranks.size - 1

    def open(self, model: nn.Module, fp32_gradients: bool) -> None:
        """Take the model as DeepSpeed keeps it. fp32_gradients: see Engine."""
        assert isinstance(model, Transformer)
        self.model = model
        self.dtype = next(model.parameters()).dtype
        self._lent: list[tuple[nn.Parameter, int]] = []
        self._borrowed: list[Tensor] = []
        self._tables: list[Any] = []  # that are being received
        for module, name in _shared(model):
            if self.stage.borrows(name):
                tables = {k: t for k, t in vars(module).items() if isinstance(t, Tensor)}
                for inner, table in tables.items():
                    leaf = table.detach().to(self.device, self.dtype).requires_grad_()
                    if fp32_gradients:
                        leaf.grad_dtype = torch.float32
                    setattr(module, inner, leaf)
                    self._borrowed.append(leaf)
            stages = self.stage.borrowers(name)
            self._lent += [(p, stage) for p in module.parameters() for stage in stages]
        for linear in model.modules() if self.schedule == "zero-bubble" else ():
            # Of some weights, ranks that divide matrices sum the gradient by a hook.
            if isinstance(linear, Linear) and not linear.weight._backward_hooks:
                linear.product = self._product

    def backward(
        self,
        micros: Sequence[Any],
        scale: float,
        seed: Callable[[int, int], None],
        mark: Callable[[str], None],
    ) -> Tensor:
        """Add up the gradients of `scale` times the losses of this rank's micro-batches of a step.
        Return the summed loss of each, fp32 of shape (n,), on the last stage, and 0 on the others.
        All ranks have equally many.

        seed: sets the random state for a micro-batch, by its index, and a part.
        """
        self.is_stale = True  # nearly always: an update came before
        self._refresh()
        self._micros, self._scale = micros, scale
        self._losses = torch.zeros(len(micros), device=self.device)
        self._inputs: dict[tuple[int, int], ResidualStream] = {}
        self._roots: dict[tuple[int, int], list[Tensor]] = {}
        self._outputs: dict[Key, list[Tensor]] = {}
        self._delayed: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor, Tensor]]] = {}
        self._arriving: dict[Key, tuple[list[Any], list[Tensor]]] = {}
        chunks = len(self.stage.parts)
        order = order_of(self.schedule, self.ranks.size, chunks, len(micros))
        for action in order.actions[self.ranks.rank]:
            kind, part, micro, of = action
            if kind == "get":
                self._arriving[of, part, micro] = self._get(of, part, self._micros[micro])
            elif kind == "send":
                self._send(self._outputs.pop((of, part, micro)), of, part)
            elif kind == "F":
                inputs = self._arrived("F", part, micro, mark) if part else []
                mark("forward")
                seed(self._micros[micro].index, part)
                self._forward(part, micro, inputs)
            elif kind == "W":
                mark("backward")
                self._weights(part, micro)
            else:
                gradients = self._arrived("B", part, micro, mark) if part < self.last else []
                mark("backward")
                self._backward(part, micro, gradients)
                self._delayed[part, micro], self.later = self.later, []
        self._return_gradients()
        self._settle()
        return self._losses

    def _forward(self, part: int, i: int, inputs: list[Tensor]) -> None:
        stream = None
        if part:
            stream = self._inputs[part, i] = ResidualStream(*(t.requires_grad_() for t in inputs))
        output, penalty = self._part(part, stream, self._micros[i])
        if part == self.last:
            total = output.sum()
            self._roots[part, i] = [(total + penalty) * self._scale]
            self._losses[i] = total.detach()
        else:
            tensors = [t for t in output if t is not None]
            self._roots[part, i] = tensors
            if isinstance(penalty, Tensor) and penalty.requires_grad:
                self._roots[part, i] = [*tensors, penalty * self._scale]
            self._outputs["F", part, i] = [t.detach() for t in tensors]

    def _backward(self, part: int, i: int, gradients: list[Tensor]) -> None:
        roots = self._roots.pop((part, i))
        of_losses = [None] * (len(roots) - len(gradients))
        torch.autograd.backward(roots, [*gradients, *of_losses])
        if part:
            inputs = [t for t in self._inputs.pop((part, i)) if t is not None]
            grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]
            self._outputs["B", part, i] = grads

    @torch.no_grad()
    def _weights(self, part: int, i: int) -> None:
        """Make the gradients of weights that a backward pass has left."""
        for weight, x, gradient in self._delayed.pop((part, i)):
            product = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
            dtype = weight.grad_dtype or weight.dtype
            if weight.grad is None:
                weight.grad = product.to(dtype)
            else:
                weight.grad += product.to(dtype)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        product: Tensor = _WeightLater.apply(x, weight, self)
        return product

    def _part(self, part: int, stream: ResidualStream | None, micro: Any) -> tuple[Any, Any]:
        _wait(self._tables)
        self._tables = []
        positional, named = micro.arguments(self.device)
        return self.model.part(part, stream, *positional, **named)

    @torch.no_grad()
    def losses(self, micro: Any, everywhere: bool) -> Tensor:
        """Return the loss of each row of a micro-batch, (B,); see Engine. All stages call it."""
        self._refresh()
        losses = torch.zeros(len(micro.tokens), device=self.device)
        for part in self.stage.parts:
            stream = None
            if part:
                works, tensors = self._get("F", part, micro)
                _wait(works)
                stream = ResidualStream(*tensors)
            output, _ = self._part(part, stream, micro)
            if part == self.last:
                losses = output.float().contiguous()
            else:
                self._send([t for t in output if t is not None], "F", part)
        if everywhere:
            dist.broadcast(losses, group=self.ranks.group, group_src=self.ranks.size - 1)
        return losses

    def _get(self, of: str, part: int, micro: Any) -> tuple[list[Any], list[Tensor]]:
        """Begin to receive the input of a part (F), or the gradient of its output (B)."""
        shapes = self.model.stream_shapes(*micro.tokens.shape)
        tensors = [torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes]
        source = (part - 1 if of == "F" else part + 1) % self.ranks.size
        return [self._p2p(dist.irecv, t, source) for t in tensors], tensors

    def _arrived(self, of: str, part: int, micro: int, mark: Callable[[str], None]) -> list[Tensor]:
        mark("stream")
        works, tensors = self._arriving.pop((of, part, micro))
        _wait(works)
        return tensors

    def _send(self, tensors: Sequence[Tensor], of: str, part: int) -> None:
        """Begin to send the output of a part (F), or the gradient of its input (B)."""
        target = (part + 1 if of == "F" else part - 1) % self.ranks.size
        self._sent = [each for each in self._sent if not each[0].is_completed()]
        while len(self._sent) >= _MOST_SENT:  # in an evaluation the next stage may be slower
            self._sent.pop(0)[0].wait()
        for tensor in map(torch.Tensor.contiguous, tensors):
            assert tensor.dtype == self.dtype, tensor.dtype
            self._sent.append((self._p2p(dist.isend, tensor, target), tensor))

    def _p2p(self, call: Callable[..., Any], tensor: Tensor, stage: int) -> Any:
        peer = "group_dst" if call is dist.isend else "group_src"
        return call(tensor, group=self.ranks.group, **{peer: stage})

    def _settle(self) -> None:
        """Wait for all that is being sent."""
        _wait([work for work, _ in self._sent])
        self._sent.clear()

    def _refresh(self) -> None:
        """Begin to receive the tables that this stage borrows, and to send those that it lends, if
        they may have changed. They arrive while the first micro-batch passes the stages before."""
        if self.is_stale:
            for p, stage in self._lent:
                self._sent.append((self._p2p(dist.isend, p.data, stage), p.data))
            self._tables = [self._p2p(dist.irecv, table.data, 0) for table in self._borrowed]
        self.is_stale = False

    def _return_gradients(self) -> None:
        """Send the gradients of borrowed tables to the first stage, which adds them to its own."""
        for table in self._borrowed:
            gradient = torch.zeros_like(table) if table.grad is None else table.grad
            self._sent.append((self._p2p(dist.isend, gradient, 0), gradient))
            table.grad = None
        for p, stage in self._lent:
            dtype = p.grad_dtype or p.dtype
            gradient = torch.empty(p.shape, dtype=dtype, device=p.device)
            _wait([self._p2p(dist.irecv, gradient, stage)])
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()
