"""Where DeepSpeed stores a parameter's master weight, moments and gradient, by optimizer class.

With layout.py the only file that touches DeepSpeed's private attributes (read in 0.19.8).

Facts about DeepSpeed that are worked around here:
- DeepSpeed 0.19.8 builds four optimizers from our configs: none around the base optimizer (stage 0,
  fp32), FP16_UnfusedOptimizer (stage 0, bf16 and fp16), DeepSpeedZeroOptimizer (1, 2) and
  DeepSpeedZeroOptimizer_Stage3. Its tensor-fragment functions work fully for none of them: they
  return None at stage 0, raise for every parameter group but the first at 1 and 2, and can hang on
  Muon's momentum.
- At stages 1 and 2 Muon orthogonalises inside `backward`, so DeepSpeed's norm and clipping
  see the update instead of the gradient. We hold the gradient back there, and let DeepSpeed flatten
  it in `step`.
- At stages 1 and 2 a rank's Muon momentum is a row of complete matrices, one for each parameter of
  which the rank holds a part; all other states are flat partitions.
- FP16_UnfusedOptimizer makes one step with zero gradients while it is built.
- Where the weights are bf16 or fp16, DeepSpeed accumulates gradients in fp32 at stage 3 alone: at 0
  and 1 it refuses to with these optimizers, at 2 it leaves Muon's group out. At 0 to 2 torch makes
  the `.grad` of each parameter in fp32, and DeepSpeed's buffers take its type.
- With overlap_comm, stages 1 and 2 free a gradient that is larger than a bucket while a stream may
  still reduce it. All others are in a bucket, and each backward pass ends with a wait for the
  device, so what we hold is complete. That wait stays: DeepSpeed records the buckets for the other
  stream, and a host that runs ahead would allocate new ones for each micro-batch.
- Stage 3 lets the host wait for the stream that reduces gradients at the end of each backward pass.
  Its buckets stay, so we let the stream wait that reads the gradients.
- A step of stage 3 ends with a wait of the host, if there are weights so small that each rank has
  them whole. It is all that keeps the next gathers, in a stream of their own, behind the update:
  we let that stream wait, always.
- At stage 3 a parameter that a step doesn't use keeps the gradient of the last one that did. Models
  that may leave some out have the buffer emptied before each step; ours use all.
- At stage 3, and at 0 in bf16 and fp16, the step computes a norm of its own, only to skip an update
  that isn't finite: the host waits for numbers of each group, at 0 of each gradient. The engine has
  measured the norm. In fp16 at stage 3 DeepSpeed's stays: that one sees Muon's updates.
- At stage 3 it gathers whole matrices for Muon on all ranks. Ours are spread over them (spread.py),
  without offload and where no weight has more than three dimensions.
  So Muon's gradients can be scattered there as all others.
- The base optimizer (Muon) takes the gradient of a flat partition as the update; its own step
  orthogonalises only 2-D weights (stage 0).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch

from forescale.engine.gathers import reduce_scattered
from forescale.engine.layout import Layout, Piece, Replicated, Unit
from forescale.engine.optimizers.muon import together
from forescale.engine.optimizers.spread import Slice, update_parts
from forescale.engine.parallel.replicas import add_replicas


def layout_of(engine, fp32_gradients: bool = False) -> Layout:
    """Return the layout of a DeepSpeed engine. Raises AssertionError for an unknown optimizer.

    fp32_gradients: the engine adds up gradients in fp32 from now on.
    """
    optimizer = engine.optimizer
    name = type(optimizer).__name__
    if optimizer is engine.basic_optimizer:
        return Bare(engine)
    known = {
        "FP16_UnfusedOptimizer": Unfused,
        "DeepSpeedZeroOptimizer": Zero12,
        "DeepSpeedZeroOptimizer_Stage3": Zero3,
    }
    assert name in known, f"DeepSpeed built {name}, which this version of forescale cannot save"
    layout = known[name](engine)
    if fp32_gradients:
        layout.add_in_fp32()
    return layout


@contextmanager
def synchronized_by(order: Callable[[], object], target: Any = None) -> Iterator[None]:
    """Replace `synchronize` of a stream, else of the device, in which the host waits, by `order`,
    which lets streams wait for each other."""
    from deepspeed.accelerator import get_accelerator

    target = target or get_accelerator()
    target.synchronize = lambda *_: order()
    try:
        yield
    finally:
        del target.synchronize  # the object's: the class has its own


def _parts_of(units):
    """Yield the gradients of units that are flat, see Layout.parts."""
    for unit in units:
        if (grad := unit.master.grad) is not None:
            yield from ((p.param, grad[p.at : p.at + p.size]) for p in unit.pieces)


class Bare(Replicated):
    """Stage 0 in fp32: a unit is the parameter itself."""

    def units(self):
        for i, group in enumerate(self.base.param_groups):
            for p in group["params"]:
                yield Unit(i, p, [Piece(p, 0, 0, p.numel())])

    def prepare_step(self, factor):
        if factor != 1.0:
            for grad in self.gradients():
                grad.mul_(factor)


class Unfused(Replicated):
    """Stage 0 in bf16 or fp16: a unit is the fp32 master of a parameter."""

    def __init__(self, engine):
        super().__init__(engine)
        self.base.state.clear()  # left by the step that DeepSpeed made while it was built
        self.scale_in_step(lambda norm: self._master_gradients())
        self._step = self.optimizer.step
        self.optimizer.step = self._step_by_norm

    def _step_by_norm(self, closure=None):
        """Replace `step`: the same, except that a gradient is finite where its norm is, which all
        ranks know alike."""
        o, norm = self.optimizer, self.norm
        if norm is None:
            return self._step(closure)
        o.overflow = not math.isfinite(norm)
        if o.overflow:
            return o._skip_invalid_grad_norm()
        pairs = [(unit.pieces[0].param, unit.master) for unit in self.units()]
        for p, master in pairs:
            master.grad = torch.zeros_like(master) if p.grad is None else p.grad.to(master.dtype)
        o._global_grad_norm = norm
        o._update_scale(False)
        o.unscale_and_clip_grads(norm)
        o.optimizer.step()
        for _, master in pairs:
            master.grad = None
        torch._foreach_copy_([p.data for p, _ in pairs], [master.data for _, master in pairs])
        return False

    def units(self):
        groups = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
        for i, (params, masters) in enumerate(groups):
            for p, master in zip(params, masters, strict=True):
                yield Unit(i, master, [Piece(p, 0, 0, p.numel())])

    @property
    def backward_scale(self):
        # DeepSpeed scales the loss only for ZeRO, but it divides the gradients here too.
        return self.loss_scale

    def add_in_fp32(self):
        super().add_in_fp32()
        gradients_of = self.engine._get_gradients_for_reduction

        def filled():
            # Where a parameter has no gradient, DeepSpeed would give it one of the weight's type.
            for group in self.optimizer.fp16_groups:
                for p in group:
                    if p.grad is None:
                        p.grad = torch.zeros_like(p, dtype=torch.float32)
            return gradients_of()

        self.engine._get_gradients_for_reduction = filled

    def _master_gradients(self):
        for group in self.optimizer.fp32_groups:
            yield from (p.grad for p in group if p.grad is not None)

    def after_load(self):
        for unit in self.units():
            unit.pieces[0].param.data.copy_(unit.master.data)


class Zero12(Layout):
    """Stages 1 and 2: flat fp32 partitions; complete averaged gradients, held until the step."""

    def __init__(self, engine):
        super().__init__(engine)
        o = self.optimizer
        self.offload = bool(o.cpu_offload)
        self._held: dict[int, tuple] = {}
        if not self.offload:
            self._flatten, o.get_flat_partition = o.get_flat_partition, self._hold
            self.scale_in_step(self._scaled)
        if o.overlap_comm:
            self._average, o.average_tensor = o.average_tensor, self._average_beside

    def reduce_later(self):
        super().reduce_later()
        for hook in self.optimizer._grad_acc_hooks:
            hook.remove()

    def _average_beside(self, tensor, communication_data_type):
        """Replace `average_tensor`: the gradient's memory isn't given away before it is reduced."""
        if tensor.is_cuda:
            tensor.record_stream(self.optimizer.reduction_stream)
        return self._average(tensor, communication_data_type)

    def _hold(self, tensors, first_offset, partition_size, dtype, device, param_group_idx, **kw):
        """Replace `get_flat_partition` in backward: keep what it would flatten."""
        o, i = self.optimizer, param_group_idx
        arguments = (tensors, first_offset, partition_size, dtype, device, i)
        self._held[i] = (o.all_grad_tensors[i], arguments, kw)
        return []

    def add_in_fp32(self):
        super().add_in_fp32()
        o = self.optimizer
        o.dtype = o.gradient_accumulation_dtype = torch.float32  # of the buffers for gradients
        if self.offload:
            o.temp_grad_buffer_for_gpu_offload = o.temp_grad_buffer_for_gpu_offload.float()
            for group in o.params_in_partition:
                for p in group:
                    held = torch.zeros(p.numel(), dtype=torch.float32, device=o.device)
                    o.accumulated_grads_in_cpu[o.get_param_id(p)] = held

    def _scaled(self, grads):
        """Yield the gradient of the partition about to be unscaled, unless Muon has turned it into
        an update (its gradient was multiplied before)."""
        for i, master in enumerate(self.optimizer.single_partition_of_fp32_groups):
            if master.grad is grads[0] and not self.is_muon(i):
                yield master.grad

    def units(self):
        o = self.optimizer
        masters = o.single_partition_of_fp32_groups
        for i, (params, master) in enumerate(zip(o.bit16_groups, masters, strict=True)):
            pieces = []
            for p in params:
                if p._hp_mapping is not None:
                    low, high = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                    pieces.append(Piece(p, low.start, high.start, low.numel))
            yield Unit(i, master, pieces)

    def gradients(self):
        o = self.optimizer
        if self.offload:
            o._wait_for_offload_copies()
            yield from (m.grad for m in o.single_partition_of_fp32_groups if m.grad is not None)
        else:
            yield from super().gradients()

    def owned(self):
        if self.offload:
            self.optimizer._wait_for_offload_copies()
            yield from _parts_of(self.units())
            return
        for i in self._held:
            yield from self._owned_of(i)

    def _owned_of(self, group):
        grads, arguments, _ = self._held[group]
        for p, grad in zip(arguments[0], grads, strict=True):
            if p._hp_mapping is not None:
                address = p._hp_mapping.lp_fragment_address
                yield p, grad.reshape(-1)[address.start : address.start + address.numel]

    def reduced(self):
        for i, (grads, *_) in self._held.items():
            # Muon reads whole matrices.
            yield from grads if self.is_muon(i) else (part for _, part in self._owned_of(i))

    def prepare_step(self, factor):
        super().prepare_step(factor)
        o = self.optimizer
        if self.offload:
            if factor != 1.0:
                for grad in self.gradients():
                    grad.mul_(factor)
            return
        for i, (grads, arguments, kw) in self._held.items():
            if factor != 1.0 and self.is_muon(i):
                for grad in grads:
                    grad.mul_(factor)  # in bf16, torch._foreach_mul_ rounds the factor
            for param, grad in zip(arguments[0], grads, strict=True):
                self.mark(param, grad)
            o.all_grad_tensors[i] = grads
            # It returns views of what Muon returns to it, as backward asked for a list.
            with together() if self.is_muon(i) else nullcontext():
                o.averaged_gradients[i] = self._flatten(*arguments, **kw)
            o.all_grad_tensors[i] = None
        self._held.clear()

    def discard(self):
        o = self.optimizer
        self._held.clear()
        o.micro_step_id = -1
        o.zero_grad(set_to_none=True)
        if self.offload:
            o.reset_cpu_buffers()
            o._offload_accumulated_param_ids = set()
        else:
            for i in o.averaged_gradients:
                o.averaged_gradients[i] = None
                o.all_grad_tensors[i] = None

    def momentum_slot(self, unit, piece):
        if self.offload:
            return None
        at = 0
        for p in self.optimizer.params_in_partition[unit.group]:
            if p is piece.param:
                return 0, at, p.numel()
            at += p.numel()
        raise AssertionError("a piece of a parameter outside its rank's partition")

    def momentum_size(self, unit):
        if self.offload:
            return unit.master.numel()
        return sum(p.numel() for p in self.optimizer.params_in_partition[unit.group])

    def after_load(self):
        o = self.optimizer
        o._muon_pending_momentum.clear()
        o.update_lp_params()


class Zero3(Layout):
    """Stage 3: flat partitions of sub-groups; every parameter is cut into one equal part a rank."""

    def add_in_fp32(self):
        """Do nothing: by its config DeepSpeed adds each reduced gradient to a partition in fp32."""

    def __init__(self, engine):
        super().__init__(engine)
        o = self.optimizer
        self.offload = bool(o.offload_optimizer)
        if o.use_muon:
            o.reduce_scatter = True  # which it refuses while it is built
            are_matrices = all(len(p.ds_shape) <= 3 for group in o.fp16_groups for p in group)
            if are_matrices and not self.offload:
                o._apply_muon_to_accumulated_grads = self._update_matrices
        self._norms, o._get_norm_groups = o._get_norm_groups, self._norm_groups
        if not self.offload:
            self.scale_in_step(self._scaled)
            if o.reduce_and_partition_stream and o.contiguous_gradients and not o.offload_param:
                self._gathering = o.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
                self._end = o.independent_gradient_partition_epilogue
                o.independent_gradient_partition_epilogue = self._end_beside
                self._post, o._post_step = o._post_step, self._post_beside

    def _end_beside(self):
        """Replace the end of a backward pass, see above. The buckets stay; the gradients that are
        freed have been recorded for the stream."""
        reducing = self.optimizer.reduce_and_partition_stream
        with synchronized_by(lambda: torch.cuda.current_stream().wait_stream(reducing), reducing):
            self._end()

    def _post_beside(self, timer_names):
        """Replace the end of a step, see above. What it has gathered is in the current stream."""
        with synchronized_by(lambda: None):
            self._post(timer_names)
        self._gathering.wait_stream(torch.cuda.current_stream())

    def forget(self):
        if not self.offload:
            self.optimizer.grad_partitions_flat_buffer.zero_()

    def add_beside(self, replicas):
        o, original = self.optimizer, self.optimizer.partition_grads

        def partition_grads(params, partitions):  # in the stream that reduces
            buffers = original(params, partitions)
            if self.engine.is_gradient_accumulation_boundary():
                add_replicas(buffers, replicas, self.bucket_size)
            return buffers

        o.partition_grads, self.adds_beside = partition_grads, True

    def sum_over(self, ranks):
        super().sum_over(ranks)
        self.optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = self._sum_scattered

    def _sum_scattered(self, params, dtype):
        """Replace `__avg_scatter_grads`: the sum."""
        group = self.optimizer._get_param_partition_group(params[0])
        return reduce_scattered([p.grad.to(dtype) for p in params], group, mean=False)

    def _update_matrices(self):
        """Replace `_apply_muon_to_accumulated_grads`: the same updates, of matrices that are spread
        over the ranks."""
        o = self.optimizer
        for index, members in groupby(range(len(o.fp16_groups)), self._group):
            if self.is_muon(index):
                sub_groups = [*members]
                group = o._get_sub_group_process_group(sub_groups[0])
                update_parts(
                    [part for s in sub_groups for part in self._parts(s)],
                    group,
                    o.muon_beta,
                    o.muon_ns_method,
                    o.communication_data_type,
                    self.mark,
                    self.in_turns(o.fp16_groups[sub_groups[0]][0]),
                )
                o.sub_groups_lacking_loss_scale.update(sub_groups)

    def _parts(self, s: int) -> Iterator[Slice]:
        """Yield this rank's parts of the matrices of a sub-group."""
        o, master = self.optimizer, self.optimizer.fp32_partitioned_groups_flat[s]
        if "momentum_buffer" not in self.base.state.get(master, {}):
            o._create_momentum_buffer(o.fp16_partitioned_groups_flat_numel[s], s, master.ds_id)
        momenta = self.base.state[master]["momentum_buffer"]
        for p, gradient in zip(o.fp16_groups[s], o.averaged_gradients[s], strict=True):
            _, at, padded = o.grad_position[o.get_param_id(p)]
            size = max(0, min(padded, p.ds_numel - o._get_param_partition_rank(p) * padded))
            yield Slice(p, gradient, momenta[at : at + padded], size)

    def _norm_groups(self):
        """Replace `_get_norm_groups`, whose sum decides alone whether the update is skipped."""
        unknown = self.norm is None or self.optimizer.dtype == torch.float16
        return self._norms() if unknown else [self.norm]

    def _group(self, sub_group: int) -> int:
        return self.optimizer.sub_group_to_group_id[sub_group]

    def _scaled(self, sub_group):
        if not self.is_muon(self._group(sub_group)):
            yield self.optimizer.fp32_partitioned_groups_flat[sub_group].grad

    def units(self):
        o = self.optimizer
        masters = o.fp32_partitioned_groups_flat
        for s, (params, master) in enumerate(zip(o.fp16_groups, masters, strict=True)):
            pieces = []
            for p in params:
                _, at, padded = o.grad_position[o.get_param_id(p)]
                start = o._get_param_partition_rank(p) * padded
                size = max(0, min(padded, p.ds_numel - start))  # the last part may end in padding
                if size:
                    pieces.append(Piece(p, start, at, size))
            yield Unit(self._group(s), master, pieces)

    def gradients(self):
        if self.offload:
            masters = self.optimizer.fp32_partitioned_groups_flat
            yield from (m.grad for m in masters if m.grad is not None)
        else:
            yield from super().gradients()

    def owned(self):
        o = self.optimizer
        if self.offload:
            yield from _parts_of(self.units())
            return
        for s, partitions in o.averaged_gradients.items():
            yield from zip(o.fp16_groups[s], partitions, strict=True)

    def prepare_step(self, factor):
        super().prepare_step(factor)
        if factor == 1.0:
            return
        if self.offload:
            for grad in self.gradients():
                grad.mul_(factor)
            return
        for s, partitions in self.optimizer.averaged_gradients.items():
            if self.is_muon(self._group(s)):
                for grad in partitions:
                    grad.mul_(factor)

    def discard(self):
        o = self.optimizer
        o._pre_step()
        o._overflow_clean_up(o.loss_scale)

    def before_load(self):
        self.optimizer.checkpoint_event_prologue()  # release gathered parameters

    def after_load(self):
        o = self.optimizer
        masters = o.fp32_partitioned_groups_flat
        flats = zip(o.fp16_partitioned_groups_flat, o.fp16_partitioned_groups, masters, strict=True)
        for flat, parts, master in flats:
            flat.data.copy_(master.data)
            for part, value in zip(parts, o.unflatten(flat, parts), strict=True):
                part.data = value.data
        if gathering := o.parameter_offload._DeepSpeedZeRoOffload__allgather_stream:
            gathering.wait_stream(torch.cuda.current_stream())  # else nothing orders it behind
        for state in self.base.state.values() if o.use_muon else ():
            if "momentum_buffer" in state:  # in the format in which DeepSpeed makes it
                momentum = state["momentum_buffer"]
                state["momentum_buffer"] = momentum.to(o.communication_data_type)
        o.checkpoint_event_epilogue()  # gather the small parameters that stay on every rank
