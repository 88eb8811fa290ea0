"""A plan for people, as a page, and for programs, as JSON.

Invariant: nothing is computed here that `Plan` doesn't know.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forescale.config.schema import plain
from forescale.console import open_console, span
from forescale.plan.failures import Outlook
from forescale.plan.memory import as_dict
from forescale.plan.plan import Choice, Plan

_DAY = 86_400.0


def show(plan: Plan) -> None:
    """Print the page."""
    console = open_console()
    job, nodes = plan.job, plan.nodes
    where = f"{plan.world:,} {escape(plan.machine.name)}"
    where += f" in {nodes:,} nodes" if nodes > 1 else ""
    console.print(
        f"[bold]{escape(str(job.run.directory))}[/] on {where}: {plan.chosen.name}, "
        f"{job.precision.kind}, {job.optimizer.kind}"
    )
    for head, lines in (
        ("Model", _model(plan)),
        ("Run", _run(plan)),
        ("Data", _data(plan)),
    ):
        _lines(console, head, lines)
    console.print()
    console.print(_choices(plan))
    console.print(_told(plan), style="dim", soft_wrap=True)
    console.print()
    for head, lines in (
        ("Time", _time(plan)),
        ("Saves", _saves(plan)),
    ):
        _lines(console, head, lines)
    console.print()
    console.print(_failures(plan))
    for note in plan.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True)
    if job.plan.deepspeed:
        console.print("DeepSpeed", json.dumps(plan.deepspeed, indent=2))
    console.file.flush()  # before the problems, which go to stderr


def _lines(console: Console, head: str, lines: Sequence[str]) -> None:
    for n, line in enumerate(lines):
        console.print(f"{head if n == 0 else '':<6} {escape(line)}", soft_wrap=True)


def _model(plan: Plan) -> list[str]:
    kinds, price = plan.parameters, plan.price
    shown = ("embedding", "position", "blocks", "head")
    parts = [f"{k} {_short(kinds[k])}" for k in shown if kinds.get(k)]
    tied = plan.job.model.tie_embeddings if hasattr(plan.job.model, "tie_embeddings") else False
    if tied:
        parts[-1] += " (tied: counted once)"
    whole = price.full * plan.job.total_steps * plan.job.tokens_per_step
    return [
        f"{kinds['total']:,} parameters" + (": " + ", ".join(parts) if parts else ""),
        f"{_flops(price.full)} a token (causal {_flops(price.causal)}, 6N {_flops(price.six_n)}), "
        f"{_flops(whole)} in all; {_flops(price.again)} a token computed twice",
    ]


def _run(plan: Plan) -> list[str]:
    job, train = plan.job, plan.job.train
    micro = train.global_batch // (train.micro_batch * plan.world)
    return [
        f"{job.total_steps:,} steps of {job.tokens_per_step:,} tokens: {train.global_batch:,} "
        f"windows of {train.sequence_length:,}, {micro} x {train.micro_batch} a rank; "
        f"{_short(job.total_steps * job.tokens_per_step)} tokens"
    ]


def _data(plan: Plan) -> list[str]:
    return [
        f"{s.name}: {_short(s.tokens)} tokens, {_short(s.read)} read, {s.epochs:,.2f} epochs"
        + (": it repeats" if s.epochs > 1 else ": it suffices")
        for s in plan.data
    ]


def _choices(plan: Plan) -> Table:
    """A column a way to shard, a row a fact; the job's own column is bold."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    mine = plan.chosen
    every = [*plan.choices, *([] if mine in plan.choices else [mine])]
    unit, size = ("GiB", 2**30) if mine.memory.peak > 2**31 else ("MiB", 2**20)

    def shown(number: float) -> str:
        return f"{number / size:,.2f}" if number < 100 * size else f"{number / size:,.0f}"

    def line(name: str, of: Callable[[Choice], str]) -> None:
        table.add_row(name, *(of(c) for c in every))

    table.add_column(f"A rank holds, {unit}", no_wrap=True)
    for c in every:
        table.add_column(c.name, justify="right", no_wrap=True, style="bold" if c is mine else "")
    rows = [c.memory.rows() for c in every]
    for kind in rows[0]:
        if any(row[kind] for row in rows):
            table.add_row(f"  {kind}", *(shown(row[kind]) for row in rows))
    line(f"  in all, of {shown(plan.available)}", lambda c: shown(c.memory.total))
    line("fits", lambda c: "yes" if c.fits(plan.available) else "[red]no[/]")
    line("largest micro-batch", lambda c: str(c.largest or "none"))
    if mine.unlike:
        on = getattr(plan.job.model, "activation_checkpointing", False)
        line(f"activations {'un' * on}checkpointed", lambda c: shown(c.unlike))
    if any(c.memory.states.host for c in every):
        line("in the host's memory", lambda c: shown(c.memory.states.host))
    if plan.world > 1:
        line("a rank sends, GB a step", lambda c: _gb(sum(t.sent for t in c.traffic)))
        line("  inside a node, s", lambda c: f"{c.inside_seconds:,.3f}")
    if plan.nodes > 1:
        line("  between nodes, s", lambda c: f"{c.between_seconds:,.3f}")
    is_whole = plan.measured is not None or plan.given.plan.mfu is not None  # waits included
    if plan.world > 1 and mine.step.computing is not None and not is_whole:
        line("  of it waited for, s", lambda c: f"{c.step.waiting:,.3f}")
    if mine.step.seconds is not None:
        line("a step, s", lambda c: f"{c.step.seconds:,.3f}")
        line("tokens/s", lambda c: f"{c.step.tokens_per_second:,.0f}")
        if mine.step.mfu:
            line("MFU", lambda c: f"{c.step.mfu:.1%}")
    return table


def _told(plan: Plan) -> str:
    """What the table's numbers stand on."""
    m, p = plan.machine, plan.given.plan
    links = f"{m.link_efficiency:.0%} of {m.intra_node / 1e9:,.0f} GB/s a GPU inside a node"
    if plan.nodes > 1:
        links += f" and {m.inter_node / 1e9:,.0f} GB/s a node between them"
    if plan.measured is not None:
        speed = f"as run {plan.measured.run} computed, its waits included"
    elif p.mfu is not None:
        speed = f"MFU {p.mfu:.0%}, as you say"
    elif plan.chosen.step.peak is None:
        return f"No peak of the device is known: give plan.from_run or logging.peak_flops. {links}."
    else:
        peak = plan.chosen.step.peak / plan.world / 1e12
        speed = f"{m.efficiency:.0%} of {peak:,.0f} TFLOP/s while computing"
    hides = "stage 3 beside computing, others after it" if m.overlap else "nothing beside computing"
    return f"Stands on: {speed}; {links}, {hides}. Activations and times are estimates."


def _time(plan: Plan) -> list[str]:
    lines = []
    if plan.measured is not None and plan.run_as_planned is not None:
        was, said = plan.measured, plan.run_as_planned.seconds
        beside = f"; planned it would have been {said:.4g} s" if said else ""
        lines.append(
            f"{was.run}: a step took {was.seconds:.4g} s on {was.world} ranks (median of "
            f"{was.steps}){beside}"
        )
    if plan.seconds is None:
        return [*lines, "not known without a speed"]
    hours, p = plan.gpu_hours or 0.0, plan.given.plan
    lines.append(f"{span(plan.seconds)} of steps; {hours:,.1f} GPU-hours with what failures take")
    if p.gpu_hour is not None:
        lines.append(f"{hours * p.gpu_hour:,.2f} at {p.gpu_hour:g} a GPU-hour")
    if plan.machine.watts:
        energy = hours * plan.machine.watts / 1000
        paid = f", {energy * p.kilowatt_hour:,.2f}" if p.kilowatt_hour is not None else ""
        lines.append(f"{energy:,.0f} kWh at {plan.machine.watts:,.0f} W a GPU{paid}")
    return lines


def _saves(plan: Plan) -> list[str]:
    size, kept = plan.checkpoint_bytes, plan.checkpoints_kept
    every, is_counted = plan.interval, plan.job.checkpoint.every.seconds is None
    often = f" (every {span(every)})" if every and is_counted else ""
    grace = plan.job.launch.grace.seconds or 0.0
    return [
        f"{size / 1e9:,.2f} GB each, {plan.job.checkpoint.every}{often}; at most {kept} at a time: "
        f"{kept * size / 1e9:,.1f} GB of disk",
        f"training waits {plan.stall_seconds:,.1f} s, written after {plan.save_seconds:,.1f} s; "
        f"after a signal saved in {plan.lead_seconds:,.1f} s of {grace:,.0f} (launch.grace)",
    ]


def _failures(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    rate = plan.given.plan.failures
    table.add_column(f"Failures, {rate:g} in 1,000 node-days", no_wrap=True)
    others = [n for n in plan.given.plan.others if n != plan.world and plan.machine.gpus_per_node]
    gpus = [plan.world, *others]
    for n in gpus:
        table.add_column(f"{n:,} rank{'s' * (n > 1)}", justify="right", no_wrap=True)
    looks = [plan.outlook(n) for n in gpus]

    def line(name: str, of: Callable[[Outlook], str]) -> None:
        table.add_row(name, *map(of, looks))

    line("  one every", lambda o: span(o.mtbf))
    line("  back after", lambda o: span(o.restart))
    line("  ETTR, saving as configured", lambda o: f"{o.ettr:.1%}")
    line("  best to save every (Daly)", lambda o: span(o.best))
    line("  ETTR then", lambda o: f"{o.best_ettr:.1%}")
    return table


def as_json(plan: Plan) -> dict[str, Any]:
    """All of the plan as plain values; bytes and seconds without rounding."""
    job = plan.job
    return {
        "problems": [p._asdict() for p in plan.problems],
        "notes": plan.notes,
        "config": plain(job),
        "deepspeed": plan.deepspeed,
        "gpus": plan.world,
        "nodes": plan.nodes,
        "parameters": plan.parameters,
        "flops_per_token": vars(plan.price),
        "steps": job.total_steps,
        "tokens": job.total_steps * job.tokens_per_step,
        "sources": [vars(s) for s in plan.data],
        "available_bytes": plan.available,
        "chosen": plan.chosen.name,
        "choices": {c.name: _choice(c, plan) for c in [*plan.choices, plan.chosen]},
        "seconds": plan.seconds,
        "gpu_hours": plan.gpu_hours,
        "checkpoint": {
            "bytes": plan.checkpoint_bytes,
            "most_at_a_time": plan.checkpoints_kept,
            "stall_seconds": plan.stall_seconds,
            "save_seconds": plan.save_seconds,
            "signal_lead_seconds": plan.lead_seconds,
            "interval_seconds": plan.interval,
        },
        "failures": {
            str(n): {k: _finite(v) for k, v in vars(plan.outlook(n)).items()}
            for n in (plan.world, *plan.given.plan.others)
        },
        "measured": _measured(plan),
    }


def _choice(c: Choice, plan: Plan) -> dict[str, Any]:
    return {
        "bytes": c.memory.rows(),
        "states": as_dict(c.memory.states),
        "activations": vars(c.memory.activations) if c.memory.activations else None,
        "total_bytes": c.memory.total,
        "fits": c.fits(plan.available),
        "largest_micro_batch": c.largest,
        "traffic": [
            {**vars(t), "sent_by_gpu": t.sent, "sent_by_node": t.between(plan.per_node)}
            for t in c.traffic
        ],
        "step": {
            **vars(c.step),
            "seconds": c.step.seconds,
            "tokens_per_second": c.step.tokens_per_second,
            "mfu": c.step.mfu,
        },
    }


def _measured(plan: Plan) -> dict[str, Any] | None:
    if plan.measured is None or plan.run_as_planned is None:
        return None
    m = plan.measured
    return {
        "run": m.run,
        "ranks": m.world,
        "step_seconds": m.seconds,
        "planned_step_seconds": plan.run_as_planned.seconds,
        "flops_per_second": m.rate,
    }


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3g}" if size < 1e9 else f"{size / 1e9:,.1f}"


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:,.0f}"


def _flops(number: float) -> str:
    for unit, size in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}FLOP"
    return f"{number:,.0f} FLOP"
