"""The ZeRO settings of a job, and the parameters that stage 3 gathers in a step.

The gathers follow DeepSpeed 0.19.8's coordinator (zero/partitioned_param_coordinator.py): before a
module runs, in forward and backward, its parameters are gathered, and those of the next modules
ahead of their use, up to stage3_prefetch_bucket_size elements at once and about
stage3_max_live_parameters in all. They are released after the module, unless a later use of them
was already passed over while gathering ahead, or one of the next modules, within
stage3_max_reuse_distance elements, uses them again. Each block of our models is a leaf module
(engine/deepspeed_config.py), whose parameters are gathered together. DeepSpeed also gathers ahead
before a module without parameters: of our models the dropout before the blocks. Those of a class of
the user's own are left out.
Invariant: only counts; tests/distributed/test_real_costs.py compares the elements with those of
real ranks, tests/trainer/plan/test_communication.py also the number of collectives.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

from forescale.config.train import TrainJob
from forescale.engine.deepspeed_config import BLOCK, deepspeed_config
from forescale.plan.bytes.parameters import Parameter

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a value by precision


@dataclass(frozen=True)
class ZeroSettings:
    """The ZeRO settings of the derived DeepSpeed config, with DeepSpeed's defaults.

    zero: the section "zero_optimization".
    """

    stage: int
    size: int  # bytes of one weight in the forward pass
    gradient: int  # bytes of one element of the gradient that micro-batches are added to
    sent: int  # bytes of one element in a reduction of gradients
    ranks: int  # that have a copy of the states between them
    world: int  # of these, that have the same parameters
    expert_world: int  # of these, that have the same experts
    accumulation: int
    zero: Mapping[str, Any]
    waits: bool = False  # gradients are reduced at the end of a step alone: in a pipeline

    @classmethod
    def of(cls, job: TrainJob, world: int) -> "ZeroSettings":
        """Return the settings of a job on `world` ranks."""
        config = deepspeed_config(job, world)
        zero, kind = config["zero_optimization"], job.precision.kind
        if job.optimizer.matrices is not None:  # see engine/stages.py
            zero["reduce_scatter"] = True
        gradient = BYTES[job.gradient_dtype(world)]
        sent = BYTES[config.get("communication_data_type") or kind]
        mesh, rounds = job.mesh(world), max(1, job.accumulation(world))
        ranks = mesh.shards * mesh.tensor
        groups = ranks, mesh.shards, ranks // mesh.experts
        waits = mesh.pipeline > 1
        return cls(zero["stage"], BYTES[kind], gradient, sent, *groups, rounds, zero, waits)

    @property
    def bucket(self) -> int:
        """Elements of a reduce bucket."""
        return int(self.zero["reduce_bucket_size"])

    @property
    def overlap(self) -> bool:
        """Whether communication overlaps with the backward pass."""
        overlap = self.zero.get("overlap_comm")
        return self.stage == 3 if overlap is None else bool(overlap)

    @property
    def near(self) -> int:
        """Ranks of a hierarchical partition; 1: there is none."""
        return int(self.zero.get("zero_hpz_partition_size", 1))

    @property
    def fetched(self) -> int:
        """Bytes of one weight in the gathers of forward and backward passes, but for scales."""
        return 1 if self.zero.get("zero_quantized_weights") else self.size

    @property
    def persistence(self) -> int:
        """Elements up to which stage 3 keeps a parameter whole."""
        return int(self.zero.get("stage3_param_persistence_threshold", 10**5))

    def gathers(
        self,
        parameters: Sequence[Parameter],
        recompute: bool,
        experts: frozenset[str] = frozenset(),
        counted: frozenset[str] | None = None,
    ) -> "GatherTrace":
        """Return the gathers of stage 3 in one micro-batch. experts: names; counted: the names to
        count, None: all."""
        return trace_gathers(
            tuple(parameters),
            frozenset(p.name for p in parameters if p.numel <= self.persistence),
            recompute,
            reuse=int(self.zero.get("stage3_max_reuse_distance", 10**9)),
            prefetch=int(self.zero.get("stage3_prefetch_bucket_size", 5 * 10**7)),
            live=int(self.zero.get("stage3_max_live_parameters", 10**9)),
            world=self.world,
            experts=experts,
            expert_world=self.expert_world,
            counted=counted,
            whole=BLOCK in (self.zero.get("leaf_module") or {}).get("classes", ()),
        )

    def offloads(self, state: str) -> bool:
        """Whether a state (offload_optimizer, offload_param) is kept outside the device."""
        device = (self.zero.get(state) or {}).get("device", "none")
        return device not in ("none", None)


@dataclass(frozen=True)
class GatherTrace:
    """The gathers of one micro-batch.

    first: elements gathered for the first time; again: elements gathered again after a release.
    calls: number of all-gathers; calls_again: all-gathers with elements of `again`. most: maximum
    of elements that exist whole at the same time, with padding.
    """

    first: int
    again: int
    calls: int
    calls_again: int
    most: int


@dataclass(frozen=True)
class _Call:
    module: str
    is_kept: bool = False  # its parameters are not released after it


@lru_cache(maxsize=16)  # the same for all micro-batches that a plan tries
def trace_gathers(
    parameters: tuple[Any, ...],
    resident: frozenset[str],
    recompute: bool,
    *,
    reuse: int,
    prefetch: int,
    live: int,
    world: int = 1,
    experts: frozenset[str] = frozenset(),
    expert_world: int = 1,
    counted: frozenset[str] | None = None,
    whole: bool = False,
) -> GatherTrace:
    """Return the gathers of ZeRO-3 in one micro-batch.

    parameters: with `name` and `numel`, in the order of the forward pass. resident: names of
    parameters that are never released. recompute: with activation checkpointing. reuse, prefetch,
    live: elements, see above. world: each gathered parameter is padded to a multiple of it,
    `experts` to one of expert_world; with 1 nothing is gathered. counted: names; None: all. whole:
    a block is a leaf module of DeepSpeed, whose parameters are gathered together.
    """
    ranks = {p.name: expert_world if p.name in experts else world for p in parameters}
    if counted is None:
        counted = frozenset(n for n in ranks if n not in experts or expert_world > 1)
    held: dict[str, dict[str, int]] = {}
    for p in parameters:
        module = (whole and block_of(p.name)) or p.name.rpartition(".")[0]
        held.setdefault(module, {})[p.name] = p.numel
    calls = _calls(_in_order(held), recompute)
    sizes = {module: sum(of.values()) for module, of in held.items()}
    soon = _kept_for_reuse(calls, sizes, reuse, {m for m in held if whole and block_of(m)})
    ahead = [(at, n, k) for at, c in enumerate(calls) for n, k in held.get(c.module, {}).items()]
    gathered = _Gathered(resident, ranks, counted)
    last_calls: dict[str, int] = {}  # of each parameter that the look ahead has passed
    start = 0  # of the look ahead
    for at, call in enumerate(calls):
        weights = held.get(call.module, {})
        gathered.gather(weights)
        if any(last_calls.get(name, -1) < at for name in weights):
            while start < len(ahead) and ahead[start][0] <= at:
                start += 1
            last_calls.update((name, max(at, last_calls.get(name, -1))) for name in weights)
        room, chosen, size = min(live - gathered.standing, prefetch), {}, 0
        while start < len(ahead) and size < room:
            used, name, numel = ahead[start]
            start += 1
            last_calls[name] = used
            if not gathered.has(name) and name not in chosen:
                chosen[name] = numel
                size += numel
        gathered.gather(chosen)
        if not call.is_kept and not soon[at]:
            gathered.release(name for name in weights if last_calls[name] <= at + 1)
    return gathered.trace


class _Gathered:
    """The parameters that exist whole now, and the gathers so far."""

    def __init__(
        self, resident: Collection[str], ranks: Mapping[str, int], counted: Collection[str]
    ):
        self.standing = 0  # elements, without padding
        self._padded = 0
        self._resident, self._ranks, self._counted = resident, ranks, counted
        self._here: dict[str, int] = {}
        self._ever: set[str] = set()
        self._elements = {"first": 0, "again": 0}
        self._calls = self._calls_again = self._most = 0

    def has(self, name: str) -> bool:
        return name in self._here or name in self._resident

    def gather(self, weights: Mapping[str, int]) -> None:
        """Gather the weights (elements by name) that don't exist whole, in one collective."""
        missing = {name: numel for name, numel in weights.items() if not self.has(name)}
        for name, numel in missing.items():
            which = "again" if name in self._ever else "first"
            self._elements[which] += self._whole(name, numel)
            self._padded += self._whole(name, numel)
        counted = [name for name in missing if name in self._counted]
        self._calls += bool(counted)
        self._calls_again += any(name in self._ever for name in counted)
        self._ever.update(missing)
        self._here.update(missing)
        self.standing += sum(missing.values())
        self._most = max(self._most, self._padded)

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            numel = self._here.pop(name, 0)
            self.standing -= numel
            self._padded -= self._whole(name, numel)

    def _whole(self, name: str, numel: int) -> int:
        """Return the elements of a parameter with its padding, if they count."""
        ranks = self._ranks[name]
        return -(-numel // ranks) * ranks if name in self._counted else 0

    @property
    def trace(self) -> GatherTrace:
        return GatherTrace(
            **self._elements, calls=self._calls, calls_again=self._calls_again, most=self._most
        )


def _kept_for_reuse(
    calls: Sequence[_Call], sizes: dict[str, int], reuse: int, leaves: Collection[str]
) -> list[bool]:
    """Return for each call whether its module is used again within the next `reuse` elements.

    For a leaf module, DeepSpeed counts all parameters inside each later module; for other modules
    it counts the direct parameters of each later module, of which a leaf module has none.
    """
    every = {call.module for call in calls}
    inside = {
        m: [leaf for leaf in leaves if not m or f"{leaf}.".startswith(f"{m}.")] for m in every
    }
    within = {
        m: sum(n for name, n in sizes.items() if not m or f"{name}.".startswith(f"{m}."))
        for m in (every if leaves else ())
    }
    alone = {module: n for module, n in sizes.items() if module not in leaves}
    soon = _soon(calls, alone, reuse)
    of_leaves = _soon(calls, within, reuse, inside) if leaves else soon
    return [
        there if call.module in leaves else here
        for call, here, there in zip(calls, soon, of_leaves, strict=True)
    ]


def _soon(
    calls: Sequence[_Call],
    sizes: dict[str, int],
    reuse: int,
    inside: Mapping[str, Collection[str]] | None = None,
) -> list[bool]:
    """Return for each call whether its module is used again within the next `reuse` elements.

    inside: the modules that a call uses; without it, its own alone.
    """
    flags: list[bool] = []
    later: dict[str, int] = {}  # elements from the module's next use to the end
    rest = 0  # elements behind the call
    for call in reversed(calls):
        again = later.get(call.module)
        # Between the two calls lies what is behind this one, without the next one and its rest.
        flags.append(again is not None and rest - again < reuse)
        rest += sizes.get(call.module, 0)
        used = [call.module] if inside is None else inside[call.module]
        later.update(dict.fromkeys(used, rest))
    return flags[::-1]


def _in_order(held: Collection[str]) -> list[str]:
    """Return the modules in the order of the forward pass: the head, or a tied embedding, follows
    the blocks and each module for later tokens."""
    order = list(held)
    if not any(m.startswith("blocks.") for m in order):
        return order  # a class of the user's own
    head = [m for m in order if m.startswith("transform.")]
    head.append("head" if "head" in order else "embedding")
    trunk = [m for m in order if not m.startswith("mtp.") and m not in [*head[:-1], "head"]]
    # A block's value embedding is read right before it.
    values = [m for m in trunk if m.startswith("value_embeddings.")]
    trunk = [m for m in trunk if m not in values]
    for table in values:
        block = f"blocks.{table.split('.')[1]}."
        at = next(i for i, m in enumerate(trunk) if f"{m}.".startswith(block))
        trunk.insert(at, table)
    inner = ("blocks.", "value_embeddings.", "encoder_relative", "relative")
    first = next(i for i, m in enumerate(trunk) if m.startswith(inner))
    modules = [*trunk[:first], "dropout", *trunk[first:], *head]  # it looks ahead too
    later = (m for m in order if m.startswith("mtp."))
    for _, module in groupby(later, key=lambda m: m.split(".")[:2]):
        modules += [*module, *head]
    return modules


def _calls(order: Sequence[str], recompute: bool) -> list[_Call]:
    """Return the calls of modules, containers without parameters included."""
    calls = [_Call(name) for name in ("", *_with_parents(order), "")]
    met: set[str] = set()
    # The modules of a block together; each module outside the blocks is its own group.
    groups = [[*group] for _, group in groupby(order, key=lambda m: block_of(m) or m)]
    for block in reversed(groups):
        if recompute and block_of(block[0]):
            # The forward pass runs again and stops before its end, where all that autograd keeps is
            # there, and so before the hook that would release the block.
            calls += [_Call(module, is_kept=True) for module in (*block, *block)]
        # DeepSpeed counts the calls of a module whose backward is to come from its last forward
        # call on, and so releases it after the first backward alone.
        calls += (_Call(module, is_kept=module in met) for module in _with_parents(block[::-1]))
        met.update(block)
    return calls


def _with_parents(order: Sequence[str]) -> list[str]:
    """Return the modules, each preceded by its containers at their first occurrence."""
    modules: list[str] = []
    met = {"blocks", "mtp"}  # a list isn't called
    for module in order:
        parts = module.split(".")
        parents = [".".join(parts[:n]) for n in range(1, len(parts))]
        modules += [*(parent for parent in parents if parent not in met), module]
        met.update(parents)
    return modules


def block_of(module: str) -> str:
    """Return the block that contains a module; empty outside the blocks."""
    parts = module.split(".")
    depth = 2 if parts[0] == "blocks" else 3 if parts[2:3] == ["block"] else 0
    return ".".join(parts[:depth])
