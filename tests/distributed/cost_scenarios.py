"""What runs inside the ranks of test_real_costs.py: live tensors and collectives, all counted."""

import gc
import os
import sys
import time
from collections import defaultdict
from types import SimpleNamespace

import torch
import torch.distributed as dist

from tests.distributed.jobs import LENGTH, TRAIN, VOCABULARY, build_job, compose_job

MICRO_BATCHES = 3
FLAGS = 100  # bytes: most of norms and flags, which are of no kind
# Odd sizes: partition borders cut parameters, and nothing divides by the ranks.
MODEL = ["model.width=24", "model.num_layers=2", "model.num_heads=3", "model.mlp_width=41"]

OPERATIONS = {  # torch's name: ours, and where its whole tensors stand
    "all_reduce": ("all_reduce", 0, "tensor"),
    "all_gather": ("all_gather", 0, "tensor_list"),
    "all_gather_into_tensor": ("all_gather", 0, "output_tensor"),
    "reduce_scatter_tensor": ("reduce_scatter", 1, "input"),
    "all_to_all_single": ("all_to_all", 1, "input"),
    "isend": ("send", 0, "tensor"),
}


def job_of(case, world):
    """case: [stage, optimizer, precision, more overrides]."""
    stage, optimizer, precision, *words = case
    axes = ("tensor", "sequence", "pipeline")
    near = {f"engine.{axis}_parallel=2" for axis in axes} & set(words)
    words = [
        *(*MODEL, *TRAIN, "train.steps=4", f"engine=zero{stage}", "engine.bucket_bytes=4096"),
        f"train.global_batch={2 * MICRO_BATCHES * (world // 2 ** len(near))}",
        *(f"precision={precision}", f"optimizer={optimizer}", *words),
    ]
    return compose_job(words, world)


def build(case):
    size = int(os.environ["WORLD_SIZE"])
    job = job_of(case, size)
    return build_job(job, divides=job.mesh(size).exchanges)


def batch(engine, step):
    rank, size = engine.world.rank, engine.world.size
    data = torch.randint(0, VOCABULARY, (MICRO_BATCHES * size, 2, LENGTH + 1))
    mine = range(rank * MICRO_BATCHES, (rank + 1) * MICRO_BATCHES)
    from forescale.data.stream import MicroBatch

    micro = [MicroBatch(i, data[i][:, :-1].clone(), data[i][:, 1:].clone()) for i in mine]
    total = MICRO_BATCHES * size
    every = MICRO_BATCHES * engine.world.data.size  # ranks that divide a window share theirs
    return SimpleNamespace(step=step, targets=total * 2 * LENGTH, micro=micro, micro_batches=every)


def states(cases):
    """For each case, of every rank: bytes by kind, between backward and update and after it; those
    of tensors of no kind that we know; and how much more stood at two moments between."""
    return [_states(case) for case in cases]


def _states(case):
    before = _storages()
    engine = build(case)
    engine.train_step(batch(engine, 0), 1.0)
    moments: dict = {}
    _watch(engine, moments)
    engine.backward(batch(engine, 1))
    engine.measure(torch.zeros(1), 1)
    held = _sorted(engine, before)
    engine.apply(1.0, 0.5)
    after = _sorted(engine, before)
    return engine.world.gather({"held": held, "after": after, **moments})


def _watch(engine, moments):
    """Note gradients while they accumulate, the largest fp32 ones in the update, and buckets."""
    backward, base, calls = engine._deepspeed.backward, engine.layout.base, [0]
    step, o = base.step, engine.layout.optimizer

    def watched_backward(*args, **kwargs):
        calls[0] += 1
        if calls[0] == MICRO_BATCHES:
            moments["accumulating"] = _by_kind(engine)["gradients"]
        return backward(*args, **kwargs)

    def watched_step(*args, **kwargs):
        params = [p for group in base.param_groups for p in group["params"]]
        size = sum(p.grad.numel() * p.grad.element_size() for p in params if p.grad is not None)
        moments["updating"] = max(moments.get("updating", 0), size)
        return step(*args, **kwargs)

    engine._deepspeed.backward, base.step = watched_backward, watched_step
    if reduce := getattr(o, "reduce_ipg_grads", None):  # stages 1 and 2 free their buckets

        def watched_reduce(*args, **kwargs):
            size = sum(t.nbytes for bucket in o.ipg_buckets.values() for t in bucket.buffer)
            moments["buckets"] = max(moments.get("buckets", 0), size)
            return reduce(*args, **kwargs)

        o.reduce_ipg_grads = watched_reduce


def _sorted(engine, before):
    """Bytes of all live storages by kind, those of no known kind as "other".

    A thread of gloo holds a bucket for a moment after its reduction is done: once in 200 steps on
    busy cores. So what is of no kind may go within five seconds.
    """
    deadline = time.monotonic() + 5
    while (sums := _sums(engine, before)).get("other", 0) > FLAGS and time.monotonic() < deadline:
        time.sleep(0.01)
    return sums


def _sums(engine, before):
    kinds = {pointer: kind for kind, pointers in _kinds(engine).items() for pointer in pointers}
    sums = defaultdict(int)
    for pointer, size in _storages().items():
        if pointer in kinds or pointer not in before:
            sums[kinds.get(pointer, "other")] += size
    return dict(sums)


def _storages():
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    return dict(_storage(t) for t in tensors if t.device.type != "meta")


def _storage(tensor):
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _by_kind(engine):
    totals = {kind: sum(sizes.values()) for kind, sizes in _kinds(engine).items()}
    return defaultdict(int, totals)


def _kinds(engine):
    """{kind: {pointer: bytes}}; the first kind that a storage is found under counts."""
    o, base = engine.layout.optimizer, engine.layout.base
    params = list(engine.module.parameters())
    is_partitioned = hasattr(params[0], "ds_tensor")
    units = list(engine.layout.units())
    buckets = list(getattr(o, "ipg_buckets", {}).values())
    tensors = {
        "weights": [p.ds_tensor if is_partitioned else p.data for p in params],
        "resident": [p.data for p in params],
        "masters": [u.master.data for u in units],
        "moments": [
            *(v for state in base.state.values() for v in state.values()),
            *_flat(getattr(o, "_muon_pending_momentum", {}).values()),
        ],
        "gradients": [
            *(p.grad for p in params),
            *(g for held in getattr(engine.layout, "_held", {}).values() for g in held[0]),
            *_flat(getattr(o, "averaged_gradients", {}).values()),
            *_flat(getattr(o, "all_grad_tensors", {}).values()),
            getattr(o, "grad_partitions_flat_buffer", None),  # stage 3: it stays
        ],
        "buckets": [
            *_flat(getattr(b, "buffer", None) for b in buckets),
            *_flat(getattr(o, "_muon_allgather_buffers", {}).values()),
        ],
        "left out": [*engine.module.buffers(), getattr(engine.module.tallies, "totals", None)],
    }
    if not buckets and base is o:
        tensors["masters"] = []
    storages: set = set()
    pointers: dict = {kind: {} for kind in tensors}
    for kind, every in tensors.items():
        for t in every:
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes():
                pointer, size = _storage(t)
                if pointer not in storages:
                    storages.add(pointer)
                    pointers[kind][pointer] = size
    return pointers


def _flat(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _flat(value)
        elif isinstance(value, dict):
            yield from _flat(value.values())


def traffic(cases):
    """For each case, bytes of the tensors of one step's collectives, by operation and ranks: those
    of an all-to-all on average over ranks, all others on the rank that has the most."""
    log: list = []
    for name in OPERATIONS:
        setattr(dist, name, _counted(name, getattr(dist, name), log))
    results = []
    for case in cases:
        engine = build(case)
        for step in range(3):  # ZeRO-3 learns the order of modules in the first
            log.clear()
            engine.train_step(batch(engine, step), 1.0)
        sums = defaultdict(int)
        for operation, size, ranks in log:
            if ranks > 1:
                sums[f"{operation}/{ranks}"] += size
        every = engine.world.gather(dict(sums))
        for name in sums:
            counts = [of[name] for of in every]
            mean = name.startswith("all_to_all")
            sums[name] = sum(counts) / len(every) if mean else max(counts)
        results.append(dict(sums))
    return results


def _counted(name, function, log):
    kind, place, word = OPERATIONS[name]

    def counted(*args, **kwargs):
        whole = kwargs[word] if word in kwargs else args[place]
        of_muon = sys._getframe(1).f_code.co_filename.endswith(("spread.py", "matrices.py"))
        whole = args[0] if of_muon else whole  # what a rank receives
        size = sum(t.numel() * t.element_size() for t in _flat([whole]))
        groups = [x for x in (*args, *kwargs.values()) if isinstance(x, dist.ProcessGroup)]
        # Norms, flags, and the numbers of a step in fp64.
        is_left_out = size <= 16 or any(t.dtype == torch.float64 for t in _flat([whole]))
        if name != "all_reduce" or not is_left_out:
            log.append(("muon" if of_muon else kind, size, dist.get_world_size(*groups[:1])))
        return function(*args, **kwargs)

    return counted
