"""The output of a plan as plain values, for programs.

Invariant: this file only arranges numbers that `Plan` computed.
"""

from typing import Any

from forescale.config.schema import plain
from forescale.plan.bytes.memory import as_dict
from forescale.plan.options import ShardingOption, cheapest
from forescale.plan.page import CLUSTERS
from forescale.plan.plan import Plan


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the whole plan as plain values; bytes and seconds are not rounded."""
    job, best = plan.job, cheapest(plan.options, plan.available)
    return {
        "problems": [p._asdict() for p in plan.problems],
        "notes": plan.notes,
        "config": plain(job),
        "deepspeed": plan.deepspeed,
        "gpus": plan.world,
        "nodes": plan.nodes,
        "parameters": plan.parameters,
        "flops_per_token": vars(plan.per_token),
        "decoding_cache_bytes": plan.cache_bytes,
        "exact": job.exactness.holds,
        "steps": job.total_steps,
        "tokens": job.total_tokens,
        "sources": [vars(s) for s in plan.data],
        "available_bytes": plan.available,
        "chosen": plan.chosen.name,
        "cheapest": best.name if best else None,
        "options": {o.name: _option(o, plan) for o in [*plan.options, plan.chosen]},
        "seconds": plan.seconds,
        "gpu_hours": plan.gpu_hours,
        "evaluation": _evaluation(plan),
        "checkpoint": {
            "bytes": plan.checkpoint_bytes,
            "max_on_disk": plan.checkpoints_kept,
            "copy_bytes_of_node": plan.copy_bytes,
            "stall_seconds": plan.stall_seconds,
            "save_seconds": plan.save_seconds,
            "signal_lead_seconds": plan.lead_seconds,
            "interval_seconds": plan.interval,
        },
        "failures": {
            str(n): {k: _finite(v) for k, v in vars(plan.failures(n)).items()}
            for n in (plan.world, *CLUSTERS)
        },
        "measured": _measured(plan),
    }


def _evaluation(plan: Plan) -> dict[str, Any] | None:
    if (cost := plan.evaluation) is None:
        return None
    every: dict[str, Any] = {
        "periodic": vars(cost.periodic),
        "at_end": cost.at_end and vars(cost.at_end),
    }
    every["abilities"] = cost.asked and vars(cost.asked)
    every["reference"] = cost.reference and vars(cost.reference)
    return {**every, "times": cost.times, "flops": cost.flops, "seconds": cost.seconds}


def _option(option: ShardingOption, plan: Plan) -> dict[str, Any]:
    memory, step = option.memory, option.step
    return {
        "bytes": memory.rows(),
        "states": as_dict(memory.states),
        "activations": vars(memory.activations) if memory.activations else None,
        "total_bytes": memory.total,
        "start_bytes": memory.start,
        "fits": option.fits(plan.available),
        "largest_micro_batch": option.largest_micro_batch,
        "memory_micro_batch": option.memory_micro_batch,
        "longest_window": option.longest_window,
        "traffic": [
            {**vars(t), "sent_by_gpu": t.sent, "sent_by_node": t.between(plan.per_node)}
            for t in option.traffic
        ],
        "latency_seconds": option.latency_seconds,
        "step": {
            **vars(step),
            "seconds": step.seconds,
            "tokens_per_second": step.tokens_per_second,
            "mfu": step.mfu,
        },
    }


def _measured(plan: Plan) -> dict[str, Any] | None:
    if plan.measured is None or plan.predicted_for_measured is None:
        return None
    m = plan.measured
    return {
        "run": m.run,
        "ranks": m.world,
        "step_seconds": m.seconds,
        "predicted_step_seconds": plan.predicted_for_measured.seconds,
        "flops_per_second": m.rate,
    }


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
