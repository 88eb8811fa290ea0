"""The output of a plan as a page for people; json_page.py has it for programs.

Invariant: this file only formats numbers that `Plan` computed. A number that nobody measured is
named as a guess, with the key that sets it: one who sets the key knows better.
"""

import json
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forescale.console import open_console, span, table
from forescale.plan.evaluation import Evaluation
from forescale.plan.failures import FailureEstimate
from forescale.plan.options import ShardingOption, cheapest, engine_keys
from forescale.plan.plan import Plan

CLUSTERS = (1_024, 4_096, 16_384)  # numbers of GPUs for which failures are also shown


def show(plan: Plan) -> None:
    """Print the plan as a page."""
    console = open_console()
    job, nodes = plan.job, plan.nodes
    where = f"{plan.world:,} {escape(plan.machine.name)}"
    where += f" in {nodes:,} nodes" if nodes > 1 else ""
    console.print(
        f"[bold]{escape(str(job.run.directory))}[/] on {where}: {plan.chosen.name}, "
        f"{job.precision.label}, {job.optimizer.kind}"
    )
    for head, lines in (
        ("Model", _model(plan)),
        ("Run", _run(plan)),
        ("Data", _data(plan)),
    ):
        _lines(console, head, lines)
    console.print()
    console.print(_options(plan))
    console.print(_cheapest(plan), soft_wrap=True)
    console.print(_assumptions(plan), style="dim", soft_wrap=True)
    console.print()
    for head, lines in (
        ("Time", _time(plan)),
        ("Evals", _evaluations(plan)),
        ("Saves", _saves(plan)),
    ):
        _lines(console, head, lines)
    console.print()
    console.print(_failures(plan))
    _lines(console, "Guess", _guesses(plan))
    for note in plan.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True)
    if job.plan.deepspeed:
        console.print("DeepSpeed", json.dumps(plan.deepspeed, indent=2))
    console.file.flush()  # before the problems, which go to stderr


def _lines(console: Console, head: str, lines: Sequence[str]) -> None:
    for n, line in enumerate(lines):
        console.print(f"{head if n == 0 else '':<6} {escape(line)}", soft_wrap=True)


def _model(plan: Plan) -> list[str]:
    kinds, per_token = plan.parameters, plan.per_token
    shown = ("embedding", "tables", "position", "blocks", "trained adapters", "head")
    parts = [f"{k} {_short(kinds[k])}" for k in shown if kinds.get(k)]
    tied = plan.job.model.tie_embeddings if hasattr(plan.job.model, "tie_embeddings") else False
    if tied:
        parts[-1] += " (tied: counted once)"
    if later := kinds.get("mtp"):
        parts.append(f"later tokens {_short(later)} (in training alone)")
    has_experts = kinds.get("active", kinds["total"]) < kinds["total"] - (later or 0)
    whole = per_token.full * plan.job.total_tokens
    lines = [
        f"{kinds['total']:,} parameters"
        + (f", {kinds['active']:,} active for a token" if has_experts else "")
        + (": " + ", ".join(parts) if parts else ""),
        f"{_flops(per_token.full)} per token (causal {_flops(per_token.causal)}, 6N "
        f"{_flops(per_token.six_n)}), {_work(whole)} in total; "
        f"{_flops(per_token.recomputed)} per token recomputed",
    ]
    if plan.cache_bytes is not None:
        length = plan.job.train.sequence_length
        has_source = getattr(plan.job.model, "has_encoder", False)
        row = "row of source and target" if has_source else "sequence"
        lines.append(f"decoding keeps {_bytes(plan.cache_bytes)} for a {row} of {length:,} tokens")
    return lines


def _run(plan: Plan) -> list[str]:
    job, train, unit = plan.job, plan.job.train, plan.job.objective.unit
    mesh, rows = job.mesh(plan.world), job.objective.spec.rows
    micro = train.global_batch // (train.micro_batch * mesh.data)
    each = f"{mesh.near} ranks" if mesh.near > 1 else "rank"
    grows = f"; {job.batch_ramp}, the batch of the table below" if job.batch_ramp.lengths else ""
    size = f"{train.sequence_length:,}" if rows == 1 else f"{rows} x {train.sequence_length:,}"
    return [
        f"{job.total_steps:,} steps of {job.tokens_per_step:,} {unit}: {train.global_batch:,} "
        f"windows of {size}, {micro} x {train.micro_batch} per {each}; "
        f"{_short(job.total_tokens)} {unit} in total{grows}",
        job.exactness.sentence,
    ]


def _data(plan: Plan) -> list[str]:
    return [
        f"{s.name}: {_short(s.tokens)} tokens, {_short(s.read)} tokens read, {s.epochs:,.2f} epochs"
        + (" (repeated)" if s.epochs > 1 else "")
        for s in plan.data
    ]


def _options(plan: Plan) -> Table:
    """Return a table with a column for each sharding option; the job's own column is bold."""
    mine = plan.chosen
    every = [*plan.options, *([] if mine in plan.options else [mine])]
    unit, size = ("GiB", 2**30) if mine.memory.peak > 2**31 else ("MiB", 2**20)

    def shown(number: float) -> str:
        return f"{number / size:,.2f}" if number < 100 * size else f"{number / size:,.0f}"

    def line(name: str, of: Callable[[ShardingOption], str]) -> None:
        made.add_row(name, *(of(option) for option in every))

    head = f"Memory of a rank, {unit}"
    made = table(head, *(option.name for option in every), left=[head])
    made.columns[1 + every.index(mine)].style = "bold"
    rows = [option.memory.rows() for option in every]
    for kind in rows[0]:
        if any(row[kind] for row in rows):
            made.add_row(f"  {kind}", *(shown(row[kind]) for row in rows))
    line(f"  total, of {shown(plan.available)}", lambda o: shown(o.memory.total))
    line("fits", lambda o: "yes" if o.fits(plan.available) else "[red]no[/]")
    line("largest micro-batch", lambda o: str(o.largest_micro_batch or "none"))
    if any(option.is_limited_by_batch for option in every):
        line("  limited by", lambda o: "global batch" if o.is_limited_by_batch else "memory")
        line("  with a larger global batch", lambda o: f"{o.memory_micro_batch or 0:,}")
    if mine.other_activations:
        line("longest window, one at a time", lambda o: f"{o.longest_window or 0:,}")
    for how in mine.other_activations:
        cells = (shown(option.other_activations[how]) for option in every)
        made.add_row(f"activations, checkpointing {how}", *cells)
    if any(option.memory.states.host for option in every):
        line("in CPU memory", lambda o: shown(o.memory.states.host))
    line("CPU memory to start", lambda o: shown(o.memory.start))
    if plan.world > 1:
        line("sent by a rank per step, GB", lambda o: _gb(sum(t.sent for t in o.traffic)))
        line("  time inside a node, s", lambda o: f"{o.inside_seconds:,.3f}")
        if plan.nodes > 1:
            line("  time between nodes, s", lambda o: f"{o.between_seconds:,.3f}")
        line("  collectives per step", lambda o: f"{sum(t.calls for t in o.traffic):,}")
        line("  their latency, s", lambda o: f"{o.latency_seconds:,.3f}")
    # A measured speed and an MFU already include the waiting.
    is_whole = plan.measured is not None or plan.given.plan.mfu is not None
    if plan.world > 1 and mine.step.computing is not None and not is_whole:
        line("  not overlapped, s", lambda o: f"{o.step.waiting:,.3f}")
    if mine.step.seconds is not None:
        line("time of a step, s", lambda o: f"{o.step.seconds:,.3f}")
        line("tokens/s", lambda o: f"{o.step.tokens_per_second:,.0f}")
        if mine.step.mfu:
            line("MFU", lambda o: f"{o.step.mfu:.1%}")
    return made


def _cheapest(plan: Plan) -> str:
    """Return which option that fits is the cheapest, and the keys that choose it."""
    best = cheapest(plan.options, plan.available)
    if best is None:
        return "No ZeRO stage fits."
    found = f"Cheapest that fits: {best.name}"
    if best.step.seconds is not None:
        found += f", {best.step.seconds:,.3g} s a step"
    if best.name == plan.chosen.name:
        return f"{found}, as configured."
    if plan.chosen.fits(plan.available) and plan.chosen.is_as_fast_as(best):
        return f"{found}; {plan.chosen.name}, as configured, is as fast."
    return f"{found}: set {engine_keys(plan.job, best.job).strip()}"


def _assumptions(plan: Plan) -> str:
    """Return what the table stands on."""
    m, p = plan.machine, plan.given.plan
    links = f"links of {m.intra_node / 1e9:,.0f} GB/s per GPU in a node"
    if plan.nodes > 1:
        links += f" and {m.inter_node / 1e9:,.0f} GB/s per node between nodes"
    if plan.measured is not None:
        speed = f"the speed of run {plan.measured.run}, which includes waiting"
    elif p.mfu is not None:
        speed = f"an MFU of {p.mfu:.0%} (plan.mfu), which includes waiting"
    elif plan.chosen.step.peak is None:
        todo = "set plan.from_run or logging.peak_flops"
        return f"The peak FLOP/s of the device are not known: {todo}. Assumed: {links}."
    else:
        speed = f"a peak of {plan.chosen.step.peak / plan.world / 1e12:,.0f} TFLOP/s per GPU"
    overlap = "stages 2 and 3 overlap communication by default" if m.overlap else "no overlap"
    return f"Assumed: {speed}; {links}; {overlap}. Activations and times are estimates."


def _guesses(plan: Plan) -> list[str]:
    """Return the numbers that nobody measured for this job, unless the user set their keys."""
    m, p = plan.machine, plan.given.plan
    found = []
    if plan.measured is None and p.mfu is None and plan.chosen.step.peak is not None:
        found.append(
            f"matrix products reach {m.efficiency:.0%} of the peak (machine.efficiency), attention "
            f"{m.attention_efficiency or m.efficiency:.0%} (machine.attention_efficiency); "
            "plan.from_run=NAME measures them"
        )
    if plan.world > 1:
        links = (
            f"links reach {m.link_efficiency:.0%} of their speed (machine.link_efficiency); a step "
            f"of a collective takes {m.intra_latency * 1e6:g} us in a node (machine.intra_latency)"
        )
        if plan.nodes > 1:
            links += f", {m.inter_latency * 1e6:g} us between nodes (machine.inter_latency)"
        found.append(links)
    found.append(f"a node writes {_bytes(m.node_write)}/s (machine.node_write)")
    if p.failures:
        found.append(
            f"{p.failures:g} failures per 1,000 node-days (plan.failures); {p.restart} from when "
            "one is noticed until it trains again (plan.restart)"
        )
    return found


def _time(plan: Plan) -> list[str]:
    lines = []
    if plan.measured is not None and plan.predicted_for_measured is not None:
        measured, predicted = plan.measured, plan.predicted_for_measured.seconds
        compared = f"; predicted without it: {predicted:.4g} s" if predicted else ""
        lines.append(
            f"{measured.run}: a step took {measured.seconds:.4g} s on {measured.world} ranks "
            f"(median of {measured.steps}){compared}"
        )
    if plan.seconds is None:
        return [*lines, "not known, because no speed is known"]
    hours, p = plan.gpu_hours or 0.0, plan.given.plan
    lines.append(
        f"{_days(plan.seconds)} for all steps; {hours:,.{1 if hours < 1000 else 0}f} GPU-hours, "
        "with evaluations and failures"
    )
    if p.gpu_hour is not None:
        lines.append(f"cost: {hours * p.gpu_hour:,.2f} at {p.gpu_hour:g} per GPU-hour")
    if plan.machine.watts:
        energy = hours * plan.machine.watts / 1000
        cost = energy * p.kilowatt_hour if p.kilowatt_hour is not None else None
        paid = "" if cost is None else f", cost: {cost:,.2f}"
        used = f"{energy:,.0f} kWh" if energy < 1e5 else f"{energy / 1e3:,.0f} MWh"
        lines.append(f"{used} at {plan.machine.watts:,.0f} W per GPU{paid}")
    return lines


def _evaluations(plan: Plan) -> list[str]:
    if (cost := plan.evaluation) is None:
        return ["not known: the data can't be read, and validation.windows is not set"]

    def one(evaluation: Evaluation) -> str:
        seconds, n = evaluation.seconds, evaluation.windows
        took = "" if seconds is None else f", {span(seconds)}"
        return f"{n:,} window{'s' * (n != 1)}, {_flops(evaluation.flops)}{took}"

    every = plan.job.validation.every
    last = f"all {one(cost.at_end)}" if cost.at_end else "all, not known without the data"
    lines = [f"every {every}: {one(cost.periodic)} each; at the end {last}", *cost.asked_lines]
    if cost.reference:
        lines.append(f"the reference reads before the first step {one(cost.reference)}")
    if cost.flops is not None and cost.times is not None:
        n = cost.times + bool(cost.at_end) + bool(cost.reference)
        parts = [f"{n:,} evaluation{'s' * (n != 1)}: {_flops(cost.flops)}"]
        if cost.seconds is not None and plan.seconds:
            share = cost.seconds / (cost.seconds + plan.seconds)
            parts.append(f"{span(cost.seconds)}, {share:.1%} of the time with the steps")
        lines.append(", ".join(parts))
    return lines


def _saves(plan: Plan) -> list[str]:
    size, kept = plan.checkpoint_bytes, plan.checkpoints_kept
    every, is_counted = plan.interval, plan.job.checkpoint.every.seconds is None
    often = f" (every {span(every)})" if every and is_counted else ""
    grace = plan.job.launch.grace.seconds or 0.0
    copy = f"; its copy keeps {_bytes(plan.copy_bytes)} of a node's CPU memory"
    return [
        f"{_bytes(size)} every {plan.job.checkpoint.every}{often}; at most {kept} on disk: "
        f"{_bytes(kept * size)}{copy if plan.copy_bytes else ''}",
        f"a save pauses training for {span(plan.stall_seconds)} and is written after "
        f"{span(plan.save_seconds)}; after a signal the run is saved within "
        f"{span(plan.lead_seconds)} (allowed: {span(grace)}, launch.grace)",
    ]


def _failures(plan: Plan) -> Table | str:
    """Return a table with a column for each cluster size; a sentence if there are no failures.

    ETTR: effective training time ratio, the fraction of the wall time that is kept training.
    """
    if not plan.given.plan.failures:
        useful = plan.failures(plan.world).ettr
        return f"Failures: none expected (plan.failures=0); saves leave {useful:.1%} useful time"
    head = f"Failures ({plan.given.plan.failures:g} per 1,000 node-days)"
    others = [n for n in CLUSTERS if n != plan.world and plan.machine.gpus_per_node]
    gpus = [plan.world, *others]
    made = table(head, *(f"{n:,} rank{'s' * (n > 1)}" for n in gpus), left=[head])
    estimates = [plan.failures(n) for n in gpus]

    def line(name: str, of: Callable[[FailureEstimate], str]) -> None:
        made.add_row(name, *map(of, estimates))

    line("  mean time between failures", lambda e: span(e.mtbf))
    line("  time until training resumes", lambda e: span(e.restart))
    line("  useful time (ETTR), as configured", lambda e: f"{e.ettr:.1%}")
    line("  best save interval (Daly 2006)", lambda e: span(e.best))
    line("  useful time (ETTR) with it", lambda e: f"{e.best_ettr:.1%}")
    return made


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3g}" if size < 1e9 else f"{size / 1e9:,.1f}"


def _bytes(number: float) -> str:
    units = zip("TGMk", (1e12, 1e9, 1e6, 1e3), strict=True)
    return _scaled(number, units) + ("B" if number >= 1e3 else "bytes")


def _days(seconds: float) -> str:
    """A length of time; of two days and more, days and hours: 12 h, 2 d 4 h, 38 d."""
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if 2 <= days < 10 and hours else span(seconds)


def _work(flops: float) -> str:
    """FLOPs of a run; of large ones also in PFLOP-days."""
    days = flops / 1e15 / 86_400
    return _flops(flops) + (f" ({days:,.3g} PFLOP-days)" if days >= 0.1 else "")


def _short(number: float) -> str:
    return _scaled(number, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)), digits=4).rstrip()


def _flops(number: float) -> str:
    return f"{_scaled(number, zip('ZEPTGM', (1e21, 1e18, 1e15, 1e12, 1e9, 1e6), strict=True))}FLOP"


def _scaled(number: float, units: Iterable[tuple[str, float]], digits: int = 3) -> str:
    """A number and the largest unit that it reaches; a smaller one has a space and no unit."""
    unit, size = next(((u, s) for u, s in units if number >= s), ("", 0.0))
    return f"{number / size:.{digits}g} {unit}" if size else f"{number:,.0f} "
