"""A plan as one table of rows, for the terminal, for a page and for programs alike.

Invariant: this file only formats numbers that `Plan` computed; values are not rounded. A number
that nobody measured is in the block "Guess", with the key that sets it.
"""

import json
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from rich.markup import escape

from forescale.config.schema import plain
from forescale.engine.deepspeed_config import deepspeed_config
from forescale.ground.console import open_console, span
from forescale.plan.blocks import (
    Block,
    Row,
    bytes_text,
    flops_text,
    in_unit,
    print_blocks,
    put_values,
    sections_of,
    short,
)
from forescale.plan.bytes.memory import checkpoints_kept
from forescale.plan.evaluation import Evaluation
from forescale.plan.options import ShardingOption, cheapest, engine_keys, name_of
from forescale.plan.outer import outer_rows
from forescale.plan.plan import Plan
from forescale.plan.search import Division
from forescale.plan.work import ONE_ORDER

CLUSTERS = (1_024, 4_096, 16_384)  # numbers of GPUs for which failures are also estimated


def show(plan: Plan) -> None:
    """Print the plan."""
    console = open_console()
    console.print(f"[bold]{escape(_title(plan))}[/]")
    print_blocks(console, blocks(plan))
    for note in plan.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True)
    if plan.job.plan.deepspeed:
        console.print("DeepSpeed", json.dumps(deepspeed_config(plan.job, plan.world), indent=2))
    console.file.flush()  # before the problems, which go to stderr


def page(plan: Plan, command: Sequence[str]) -> str:
    """Return the plan as an HTML page. command: the command line that made it."""
    from forescale.pages.document import Section, code, render  # with numpy, which is slow

    sections = sections_of(blocks(plan))
    problems = [f"{p.key}: {p.problem}; {p.todo}." for p in plan.problems]
    sections.append(Section("notes", "Problems and notes", after=[*problems, *plan.notes],
                            absent="" if problems or plan.notes else "None."))  # fmt: skip
    lead = [code(shlex.join(command))]
    return render(title=f"Plan of {_title(plan)}", lead=lead, sections=sections)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the whole plan as plain values; bytes and seconds are not rounded."""
    facts: dict[str, Any] = {
        "problems": [p._asdict() for p in plan.problems],
        "notes": plan.notes,
        "config": plain(plan.job),
        "deepspeed": deepspeed_config(plan.job, plan.world),
        "gpus": plan.world,
        "nodes": plan.nodes,
    }
    return put_values(facts, blocks(plan))


def _title(plan: Plan) -> str:
    job, nodes = plan.job, f" in {plan.nodes:,} nodes" if plan.nodes > 1 else ""
    return (
        f"{job.run.directory} on {plan.world:,} {plan.machine.name}{nodes}: {plan.chosen.name}, "
        f"{job.precision.label}, {job.optimizer.kind}"
    )


def blocks(plan: Plan) -> list[Block]:
    """Return the whole plan."""
    best = cheapest(plan.options, plan.available)
    return [
        Block("Model", _model(plan)),
        Block("Run", _run(plan)),
        Block("Data", _data(plan)),
        Block("", [
            Row("available_bytes", "", plan.available),
            Row("chosen", "", plan.chosen.name),
            Row("cheapest", "", best.name if best else None),
            Row("sizes", "", _size_facts(plan)),
            Row("divisions", "", [{"name": name_of(d.job), **_division_facts(d),
                "words": d.words, "losses": d.losses} for d in plan.divisions]),
        ]),
        *([sizes_block(plan)] if plan.sizes else []),
        _options(plan),
        *([divisions_block(plan)] if plan.divisions else []),
        Block("Time", [*_time(plan), *outer_rows(plan)]),
        Block("Evals", _evaluations(plan)),
        Block("Saves", _saves(plan)),
        _failures(plan),
        Block("Guess", [Row("", "guess", text=text) for text in _guesses(plan)]),
    ]  # fmt: skip


def _model(plan: Plan) -> list[Row]:
    kinds, flops = plan.parameters, plan.per_token
    names = ("embedding", "tables", "position", "blocks", "trained adapters", "head")
    parts = [f"{k} {short(kinds[k])}" for k in names if kinds.get(k)]
    if getattr(plan.job.model, "tie_embeddings", False):
        parts[-1] += " (tied: counted once)"
    if later := kinds.get("mtp"):
        parts.append(f"later tokens {short(later)} (in training alone)")
    has_experts = kinds.get("active", kinds["total"]) < kinds["total"] - (later or 0)
    active = f", {kinds['active']:,} active for a token" if has_experts else ""
    in_total = flops.full * plan.job.total_tokens
    days = in_total / 1e15 / 86_400
    work = flops_text(in_total) + (f" ({days:,.3g} PFLOP-days)" if days >= 0.1 else "")
    rows = [
        Row("parameters", "parameters", kinds, "count", f"{kinds['total']:,} parameters{active}"
            + (": " + ", ".join(parts) if parts else "")),
        Row("flops_per_token", "FLOPs", vars(flops), "FLOP",
            f"{flops_text(flops.full)} per token (causal {flops_text(flops.causal)}, 6N "
            f"{flops_text(flops.six_n)}), {work} in total; "
            f"{flops_text(flops.recomputed)} per token recomputed"),
    ]  # fmt: skip
    if plan.cache_bytes is None:
        return [*rows, Row("decoding_cache_bytes", "")]
    length = plan.job.train.sequence_length
    has_source = getattr(plan.job.model, "has_encoder", False)
    of = "row of source and target" if has_source else "sequence"
    text = f"decoding keeps {bytes_text(plan.cache_bytes)} for a {of} of {length:,} tokens"
    return [*rows, Row("decoding_cache_bytes", "decoding", plan.cache_bytes, "bytes", text)]


def _run(plan: Plan) -> list[Row]:
    job, train, unit = plan.job, plan.job.train, plan.job.objective.unit
    mesh, rows = job.mesh(plan.world), job.objective.rows
    micro = job.accumulation(plan.world)
    each = f"{mesh.near} ranks" if mesh.near > 1 else "rank"
    grows = f"; {job.batch_ramp}, the batch of the table below" if job.batch_ramp.lengths else ""
    size = f"{train.sequence_length:,}" if rows == 1 else f"{rows} x {train.sequence_length:,}"
    return [
        Row("steps", "steps", job.total_steps, "count",
            f"{job.total_steps:,} steps of {job.tokens_per_step:,} {unit}: {train.global_batch:,} "
            f"windows of {size}, {micro} x {train.micro_batch} per {each}; "
            f"{short(job.total_tokens)} {unit} in total{grows}"),
        Row("tokens", "", job.total_tokens),
        Row("exact", "exactness", job.exactness.holds, "", job.exactness.sentence),
    ]  # fmt: skip


def _data(plan: Plan) -> list[Row]:
    texts = [
        f"{s.name}: {short(s.tokens)} tokens, {short(s.read)} tokens read, {s.epochs:,.2f} epochs"
        + (" (repeated)" if s.epochs > 1 else "")
        for s in plan.data
    ]
    return [Row("sources", "", [vars(s) for s in plan.data]),
            *(Row("", "source", text=text) for text in texts)]  # fmt: skip


def _size_facts(plan: Plan) -> list[dict[str, Any]]:
    """Return what each size of a range needs and costs, the largest first."""
    price = plan.given.plan.gpu_hour
    return [
        {
            "nodes": size.nodes,
            "ranks": size.world,
            "micro_batches": size.job.accumulation(size.world),
            "memory_bytes": size.chosen.memory.total,
            "fits": size.chosen.fits(size.available),
            "step_seconds": size.chosen.step.seconds,
            "seconds": (hours := size.gpu_hours) and hours * 3600 / size.world,
            "gpu_hours": hours,
            "cost": hours and price and hours * price,
        }
        for size in plan.sizes.values()
    ]


def sizes_block(plan: Plan) -> Block:
    """Return the table of the sizes of a range, a row each."""
    unit = "GiB" if plan.chosen.memory.peak > 2**31 else "MiB"
    columns = [
        ("ranks", "ranks", "count"),
        ("micro_batches", "micro-batches a rank", "count"),
        ("memory_bytes", f"memory, {unit}", unit),
        ("fits", "fits", "yes or no"),
        ("step_seconds", "a step, s", "s"),
        ("seconds", "all, with failures", "time"),
        ("gpu_hours", "GPU-hours", "hours"),
        ("cost", "price", "price"),
    ]
    sizes = _size_facts(plan)
    names, titles, units = zip(*(of for of in columns if sizes[0][of[0]] is not None), strict=True)
    rows = []
    for size in sizes:
        label = f"{size['nodes']} node{'s' * (size['nodes'] > 1)}"
        label += " *" if size["ranks"] == plan.world else ""
        rows.append(Row("", label, [size[name] for name in names], units))
    planned = "* is planned below."
    after = [f"{planned} Each start takes the largest size that is free and fits in memory."]
    return Block("Sizes", rows, titles, after=after)


def _division_facts(division: Division) -> dict[str, Any]:
    step, job = division.step, division.job
    return {
        "micro_batch": job.train.micro_batch,
        "recomputed": getattr(job.model, "activation_checkpointing", "none"),
        "memory_bytes": division.memory.total,
        "waiting": step.waiting / division.seconds,
        "bubble": step.parts.get("bubble", 0.0) / division.seconds,
        "step_seconds": division.seconds,
        "mfu": step.mfu,
    }


def divisions_block(plan: Plan) -> Block:
    """Return the table of the best divisions, a row each, with what limits it and what to type."""
    columns = {"micro-batch": "count", "recomputed": "", "memory, GiB": "GiB", "waits": "%",
               "bubble": "%", "a step, s": "s", "MFU": "%"}  # fmt: skip
    rows, after = [], list[str]()
    for division in plan.divisions:
        name = name_of(division.job)
        rows.append(Row("", name, [*_division_facts(division).values()], [*columns.values()]))
        lost = ", ".join(f"{part} {share:.0%}" for part, share in division.losses.items())
        todo = f"set {division.words}" if division.words else "as configured"
        after.append(f"{name}: {todo}" + (f"; loses to {lost}" if lost else ""))
    return Block(f"Best ways to divide it among {plan.world:,}", rows, [*columns], after=after)


def _options(plan: Plan) -> Block:
    """Return the table of memory, traffic and time, with a column for each sharding option."""
    chosen = plan.chosen
    options = [*plan.options, *([] if chosen in plan.options else [chosen])]
    unit = "GiB" if chosen.memory.peak > 2**31 else "MiB"

    rows: list[Row] = []

    def add(key: str, label: str, of: Callable[[ShardingOption], Any], unit: str = "",
            when: bool = True) -> None:  # fmt: skip
        """Add a row. when: whether people see it too."""
        values = [of(option) for option in options]
        rows.append(Row(key, label if when else "", values, unit))

    for kind in chosen.memory.rows():
        values = [option.memory.rows()[kind] for option in options]
        rows.append(Row(f"bytes.{kind}", f"  {kind}" if any(values) else "", values, unit))
    add("states", "", lambda o: dict(vars(o.memory.states)))
    add("activations", "", lambda o: o.memory.activations and vars(o.memory.activations))
    total = f"  total, of {in_unit(plan.available, unit)}"
    add("total_bytes", total, lambda o: o.memory.total, unit)
    add("fits", "fits", lambda o: o.fits(plan.available), "yes or no")
    add("largest_micro_batch", "largest micro-batch", lambda o: o.largest_micro_batch, "or none")
    is_limited = any(option.is_limited_by_batch for option in options)
    add("", "  limited by", lambda o: "global batch" if o.is_limited_by_batch else "memory",
        when=is_limited)  # fmt: skip
    add("memory_micro_batch", "  with a larger global batch", lambda o: o.memory_micro_batch,
        "count", is_limited)  # fmt: skip
    add("longest_window", "longest window, one at a time", lambda o: o.longest_window, "count",
        bool(chosen.other_activations))  # fmt: skip
    for how in chosen.other_activations:
        values = [option.other_activations[how] for option in options]
        label = f"activations, checkpointing {how}"
        rows.append(Row(f"other_activation_bytes.{how}", label, values, unit))
    add("host_bytes", "in CPU memory", lambda o: o.memory.states.host, unit,
        any(option.memory.states.host for option in options))  # fmt: skip
    add("start_bytes", "CPU memory to start", lambda o: o.memory.start, unit)
    many, crossing = plan.world > 1, plan.world > 1 and plan.nodes > 1
    add("traffic", "", lambda o: [
        {"what": t.label, **vars(t), "sent_by_gpu": t.sent,
         "sent_by_node": t.between(plan.per_node)}
        for t in o.traffic
    ])  # fmt: skip
    add("sent_bytes", "sent by a rank per step, GB", lambda o: sum(t.sent for t in o.traffic),
        "GB", many)  # fmt: skip
    add("inside_seconds", "  time inside a node, s", lambda o: o.inside_seconds, "s", many)
    add("between_seconds", "  time between nodes, s", lambda o: o.between_seconds, "s", crossing)
    add("collectives", "  collectives per step", lambda o: sum(t.calls for t in o.traffic),
        "count", many)  # fmt: skip
    add("latency_seconds", "  their latency, s", lambda o: o.latency_seconds, "s", many)
    # A measured speed and an MFU already include the waiting.
    is_whole = plan.measured is not None or plan.given.plan.mfu is not None
    add("step", "", lambda o: dict(vars(o.step)))
    add("", "  not overlapped, s", lambda o: o.step.waiting, "s",
        many and chosen.step.computing is not None and not is_whole)  # fmt: skip
    timed = chosen.step.seconds is not None
    add("step.seconds", "time of a step, s", lambda o: o.step.seconds, "s", timed)
    add("step.tokens_per_second", "tokens/s", lambda o: o.step.tokens_per_second, "per second",
        timed)  # fmt: skip
    add("step.mfu", "MFU", lambda o: o.step.mfu, "%", timed and bool(chosen.step.mfu))
    names = [option.name for option in options]
    after = [_cheapest(plan), _assumptions(plan)]
    return Block(f"Memory of a rank, {unit}", rows, names, "options", options.index(chosen), after)


def _cheapest(plan: Plan) -> str:
    """Return which option that fits is the cheapest, and the keys that choose it."""
    best = cheapest(plan.options, plan.available)
    if best is None:
        return "No ZeRO stage fits."
    text = f"Cheapest that fits: {best.name}"
    if best.step.seconds is not None:
        text += f", {best.step.seconds:,.3g} s a step"
    if best.name == plan.chosen.name:
        return f"{text}, as configured."
    if plan.chosen.fits(plan.available) and plan.chosen.is_as_fast_as(best):
        return f"{text}; {plan.chosen.name}, as configured, is as fast."
    return f"{text}: set {engine_keys(plan.job, best.job).strip()}"


def _assumptions(plan: Plan) -> str:
    """Return the assumptions behind the table."""
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
    overlap = "stages 1 to 3 overlap communication by default" if m.overlap else "no overlap"
    return f"Assumed: {speed}; {links}; {overlap}. Activations and times are estimates."


def _guesses(plan: Plan) -> list[str]:
    """Return the numbers that nobody measured for this job, unless the user set their keys."""
    m, p = plan.machine, plan.given.plan
    guesses = []
    if plan.measured is None and p.mfu is None and plan.chosen.step.peak is not None:
        guesses.append(
            f"matrix products reach {m.efficiency:.0%} of the peak (machine.efficiency), attention "
            f"{m.attention_efficiency or m.efficiency:.0%} (machine.attention_efficiency); "
            "plan.from_run=NAME measures them"
        )
    if plan.chosen.step.parts.get("waiting for launches"):
        guesses.append(
            f"a host launches a kernel in {m.launch * 1e6:g} us (machine.launch), and the GPU "
            "waits for it: more tokens at once (train.micro_batch) cost no time"
        )
    if order := plan.chosen.step.parts.get("attention in one order"):
        guesses.append(
            f"attention's backward pass takes {ONE_ORDER:g} times as long if it adds in one order "
            f"(train.deterministic): {order / (plan.chosen.step.seconds or order):.1%} of a step"
        )
    if sums := plan.chosen.step.parts.get("invariant sums"):
        guesses.append(
            f"train.invariant rounds gradients and adds their squares in {sums * 1e3:.3g} ms of a "
            "step; about 2 of 100 steps are computed twice, which no time here counts"
        )
    if plan.world > 1:
        links = (
            f"links reach {m.link_efficiency:.0%} of their speed (machine.link_efficiency); a step "
            f"of a collective takes {m.intra_latency * 1e6:g} us in a node (machine.intra_latency)"
        )
        if plan.nodes > 1:
            links += f", {m.inter_latency * 1e6:g} us between nodes (machine.inter_latency)"
        guesses.append(links)
    guesses.append(f"a node writes {bytes_text(m.node_write)}/s (machine.node_write)")
    if p.failures:
        guesses.append(
            f"{p.failures:g} failures per 1,000 node-days (plan.failures); {p.restart} from when "
            "one is noticed until it trains again (plan.restart)"
        )
    return guesses


def _time(plan: Plan) -> list[Row]:
    rows = []
    measured, predicted = plan.measured, plan.predicted_for_measured
    if measured is None or predicted is None:
        rows.append(Row("measured", ""))
    else:
        facts = {"run": measured.run, "ranks": measured.world, "step_seconds": measured.seconds,
                 "predicted_step_seconds": predicted.seconds,
                 "flops_per_second": measured.rate}  # fmt: skip
        without = f"; predicted without it: {predicted.seconds:.4g} s" if predicted.seconds else ""
        text = (
            f"{measured.run}: a step took {measured.seconds:.4g} s on {measured.world} ranks "
            f"(median of {measured.steps}){without}"
        )
        rows.append(Row("measured", "measured", facts, "s", text))
    hours, p = plan.gpu_hours or 0.0, plan.given.plan
    rows.append(Row("gpu_hours", "", plan.gpu_hours, "h"))
    if plan.seconds is None:
        text = "not known, because no speed is known"
        return [*rows, Row("seconds", "steps", None, "s", text)]
    days, rest = divmod(round(plan.seconds / 3600), 24)
    # Of two days and more also the hours: 12 h, 2 d 4 h, 38 d.
    length = f"{days} d {rest} h" if 2 <= days < 10 and rest else span(plan.seconds)
    text = (
        f"{length} for all steps; {hours:,.{1 if hours < 1000 else 0}f} GPU-hours, "
        f"with evaluations{', rounds' * (plan.job.outer.count > 1)} and failures"
    )
    rows.append(Row("seconds", "steps", plan.seconds, "s", text))
    if p.gpu_hour is not None:
        cost = hours * p.gpu_hour
        text = f"cost: {cost:,.2f} at {p.gpu_hour:g} per GPU-hour"
        rows.append(Row("cost", "cost", cost, text=text))
    if plan.machine.watts:
        energy = hours * plan.machine.watts / 1000
        paid = "" if p.kilowatt_hour is None else f", cost: {energy * p.kilowatt_hour:,.2f}"
        used = f"{energy:,.0f} kWh" if energy < 1e5 else f"{energy / 1e3:,.0f} MWh"
        text = f"{used} at {plan.machine.watts:,.0f} W per GPU{paid}"
        rows.append(Row("kilowatt_hours", "energy", energy, "kWh", text))
    return rows


def _evaluations(plan: Plan) -> list[Row]:
    if (cost := plan.evaluation) is None:
        text = "not known: the data can't be read, and validation.windows is not set"
        return [Row("evaluation", "evaluations", None, "", text)]

    def one(evaluation: Evaluation) -> str:
        seconds, n = evaluation.seconds, evaluation.windows
        took = "" if seconds is None else f", {span(seconds)}"
        return f"{n:,} window{'s' * (n != 1)}, {flops_text(evaluation.flops)}{took}"

    parts = {"periodic": cost.periodic, "at_end": cost.at_end, "abilities": cost.abilities,
             "reference": cost.reference}  # fmt: skip
    facts: dict[str, Any] = {name: part and vars(part) for name, part in parts.items()}
    facts |= {"times": cost.times, "flops": cost.flops, "seconds": cost.seconds}
    last = f"all {one(cost.at_end)}" if cost.at_end else "all, not known without the data"
    every = plan.job.validation.every
    text = f"every {every}: {one(cost.periodic)} each; at the end {last}"
    rows = [Row("evaluation", "evaluations", facts, "", text)]
    rows += [Row("", "abilities", text=line) for line in cost.ability_lines]
    if cost.reference:
        text = f"the reference reads before the first step {one(cost.reference)}"
        rows.append(Row("", "reference", text=text))
    if cost.flops is not None and cost.times is not None:
        n = cost.times + bool(cost.at_end) + bool(cost.reference)
        text = f"{n:,} evaluation{'s' * (n != 1)}: {flops_text(cost.flops)}"
        if cost.seconds is not None and plan.seconds:
            share = cost.seconds / (cost.seconds + plan.seconds)
            text += f", {span(cost.seconds)}, {share:.1%} of the time with the steps"
        rows.append(Row("", "in total", text=text))
    return rows


def _saves(plan: Plan) -> list[Row]:
    size, most = plan.checkpoint_bytes, checkpoints_kept(plan.job)
    every, is_counted = plan.interval, plan.job.checkpoint.every.seconds is None
    often = f" (every {span(every)})" if every and is_counted else ""
    grace = plan.job.launch.grace.seconds or 0.0
    copy = f"; copies of it keep {bytes_text(plan.copy_bytes)} of a node's CPU memory"
    if (peer := plan.job.checkpoint.peer) and plan.nodes > 1:
        copy += f" (each node sends the next {bytes_text(size // plan.nodes)} every {peer})"
    facts = {"bytes": size, "max_on_disk": most, "copy_bytes_of_node": plan.copy_bytes,
             "stall_seconds": plan.stall_seconds, "save_seconds": plan.save_seconds,
             "signal_lead_seconds": plan.lead_seconds, "interval_seconds": every}  # fmt: skip
    return [
        Row("checkpoint", "checkpoint", facts, "bytes",
            f"{bytes_text(size)} every {plan.job.checkpoint.every}{often}; at most {most} on disk: "
            f"{bytes_text(most * size)}{copy if plan.copy_bytes else ''}"),
        Row("", "a save", text=
            f"a save pauses training for {span(plan.stall_seconds)} and is written after "
            f"{span(plan.save_seconds)}; after a signal the run is saved within "
            f"{span(plan.lead_seconds)} (allowed: {span(grace)}, launch.grace)"),
    ]  # fmt: skip


def _failures(plan: Plan) -> Block:
    """Return the table of failures, with a column for each cluster size. ETTR: effective training
    time ratio, the fraction of the wall time that is kept training."""
    expected = plan.given.plan.failures
    others = [n for n in CLUSTERS if n != plan.world and plan.machine.gpus_per_node]
    estimates = {f"{n:,} rank{'s' * (n > 1)}": plan.failures(n) for n in [plan.world, *others]}
    after = []
    labels = {
        "mtbf": ("  mean time between failures", "time"),
        "restart": ("  time until training resumes", "time"),
        "ettr": ("  useful time (ETTR), as configured", "%"),
        "best": ("  best save interval (Daly 2006)", "time"),
        "best_ettr": ("  useful time (ETTR) with it", "%"),
    }
    if not expected:
        labels, useful = {}, plan.failures(plan.world).ettr
        text = f"none expected (plan.failures=0); saves leave {useful:.1%} useful time"
        after = [f"Failures: {text}"]
    rest = [key for key in vars(plan.failures(plan.world)) if key not in labels]
    rows = [
        Row(key, label, [vars(e)[key] for e in estimates.values()], unit)
        for key, (label, unit) in (labels | dict.fromkeys(rest, ("", ""))).items()
    ]
    title = f"Failures ({expected:g} per 1,000 node-days)"
    return Block(title, rows, [*estimates], "failures", after=after)
