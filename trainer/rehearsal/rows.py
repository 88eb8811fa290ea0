"""What a rehearsal has seen, as tables for the terminal, for a page and for programs.

Invariant: a number of the plan that the rehearsal contradicts by over 5 % has its reason beside it.
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from rich.markup import escape

from forescale.config.schema import plain
from forescale.ground.console import open_console
from forescale.models.config import ModelConfig
from forescale.plan.blocks import (
    Block,
    Row,
    bytes_text,
    flops_text,
    in_unit,
    print_blocks,
    sections_of,
)
from forescale.plan.bytes.memory import Memory, activations_of, share_bytes, states
from forescale.plan.bytes.pipeline import parts_of
from forescale.plan.communication import collectives
from forescale.plan.config import PlanJob
from forescale.plan.links import Collective
from forescale.rehearsal.rehearsal import Rehearsed, problems_of
from forescale.run.certificate import Certificate, keys_of, versions_of

NEAR = 0.05  # of what is planned
_WIDEST = 56  # characters of a name
_OF_A_STEP = ("most in forward and backward", "most in the update")
_SMALL = 1 << 16  # bytes a step: the norm, the summary and counters, which the plan leaves out
_NO_KERNELS = ", their operations one by one; with pip install 'forescale[rehearsal]' their kernels"
ONLY_A_GPU = (
    "Only a GPU shows: values, the speed of kernels and links, NCCL, fragmentation of memory, "
    "faults of hardware."
)


def show(rehearsed: Rehearsed) -> None:
    """Print what was seen."""
    console = open_console()
    console.print(f"[bold]{escape(title(rehearsed))}[/]")
    for report in rehearsed.reports:
        console.print(escape(_summary(rehearsed, report)), soft_wrap=True)
        print_blocks(console, blocks(rehearsed, report))
    for line in limits(rehearsed):
        console.print(line, soft_wrap=True)
    console.file.flush()


def page(rehearsed: Rehearsed, command: Sequence[str]) -> str:
    """Return it as an HTML page. command: the command line that made it."""
    from forescale.pages.document import Section, code, render  # with numpy, which is slow

    sections = []
    for report in rehearsed.reports:
        after = [_summary(rehearsed, report), *map(str, problems_of(report))]
        sections.append(Section("rank", f"Rank {report['rank']}", after=after))
        sections += sections_of(blocks(rehearsed, report))
    sections.append(Section("limits", "What it can't show", after=limits(rehearsed)))
    for i, section in enumerate(sections):  # several ranks have the same ones
        section.name = f"{section.name.strip(',')}-{i}"
    lead = [code(shlex.join(command))]
    return render(title=f"Rehearsal of {title(rehearsed)}", lead=lead, sections=sections)


def as_json(rehearsed: Rehearsed) -> dict[str, Any]:
    """Return all that was seen, and what was planned, as plain values. Collectives are planned of
    the first rank that was rehearsed."""
    first = rehearsed.reports[0]["rank"] if rehearsed.reports else 0
    return {
        "problems": [p._asdict() for p in rehearsed.problems],
        "config": plain(rehearsed.plan.job),
        "micro_batches": rehearsed.micro_batches,
        "accumulation": rehearsed.accumulation,
        "depths": rehearsed.depths,
        "seconds": rehearsed.seconds,
        "planned": {
            "memory_bytes": [planned_memory(rehearsed, r["rank"]) for r in rehearsed.reports],
            "collectives": [vars(c) for c in _traffic(rehearsed, first)],
            "computing_seconds": rehearsed.plan.chosen.step.computing,
        },
        "ranks": rehearsed.reports,
        "limits": ONLY_A_GPU,
    }


def certificate(job: PlanJob, rehearsed: Rehearsed) -> Certificate:
    """Return the certificate of a rehearsal without problems. job: as it is to be trained."""
    reports = rehearsed.reports
    most = max(reports, key=lambda report: report["peak_bytes"])
    planned = planned_memory(rehearsed, most["rank"])
    return Certificate(
        time=time.time(),
        keys=keys_of(job),
        gpus=job.gpus,
        versions=versions_of(job),
        ranks=[report["rank"] for report in reports],
        peak_bytes=most["peak_bytes"],
        planned_bytes=int(max(planned[label] for label in _OF_A_STEP)),
        waits=max(sum(w["times"] for w in report["waits"]) for report in reports),
        launches=max(map(_launches, reports)),
        equal_collectives=all(
            str(row.value[-1]).startswith("yes")
            for report in reports
            for row in _collectives(rehearsed, report).rows
        ),
        kernels=max(len(report["kernels"]) for report in reports),
        limits=" ".join(limits(rehearsed)),
    )


def title(rehearsed: Rehearsed) -> str:
    plan, of = rehearsed.plan, ""
    if rehearsed.micro_batches < rehearsed.accumulation:
        of = f", {rehearsed.micro_batches} of {rehearsed.accumulation} micro-batches of a step"
    job = plan.job
    return (
        f"{job.run.directory} on {plan.world:,} {plan.machine.name}: {plan.chosen.name}, "
        f"{job.precision.label}, {job.optimizer.kind}{of}"
    )


def limits(rehearsed: Rehearsed) -> list[str]:
    """Return the sentences about what was not shown."""
    if rehearsed.depths is None:
        return [ONLY_A_GPU]
    few, many = rehearsed.depths
    layers = cast(ModelConfig, rehearsed.plan.job.model).num_layers
    return [
        f"Rehearsed were {few} and {many} layers; the numbers are those of {layers}, since each "
        "further layer does the same. Buckets, sub-groups and weights that are used again change "
        "calls, bytes and peaks a little; rehearse.layers=all makes all layers.",
        ONLY_A_GPU,
    ]


def _summary(rehearsed: Rehearsed, report: dict[str, Any]) -> str:
    rank, world = report["rank"], rehearsed.plan.world
    if "error" in report and "place" not in report["error"]:
        return f"Rank {rank} of {world:,} was not rehearsed: its process ended."
    if "error" in report:
        return f"Rank {rank} of {world:,} would fail in its {report['phase']}."
    how = "uncompiled"
    if report["compiled"]:
        graphs = report["graphs"]
        how = f"{graphs} compiled graph{'s' * (graphs != 1)}"
        kernels = len(report["kernels"])
        how += f", {kernels} kernel{'s' * (kernels != 1)} assembled" if kernels else _NO_KERNELS
    return f"Rank {rank} of {world:,} was built and made its steps ({how})."


def blocks(rehearsed: Rehearsed, report: dict[str, Any]) -> list[Block]:
    """Return what was seen of a rank."""
    if "error" in report:
        return []
    return [
        _memory(rehearsed, report),
        _largest(report),
        _collectives(rehearsed, report),
        _beside(report),
        _waits(report),
        _parts(rehearsed, report),
        _operations(report),
        *([_kernels(report)] if report["kernels"] or report["breaks"] else []),
    ]


def planned_memory(rehearsed: Rehearsed, rank: int) -> dict[str, int]:
    """Return the bytes that the plan counts for a rank between steps, at the most in the passes and
    in the update, and of its part of a checkpoint."""
    plan = rehearsed.plan
    of_rank = states(plan.job, plan.trained, plan.world, rank)
    memory = _of_stage(rehearsed, rank)
    return {
        "between steps": of_rank.between,
        "most in forward and backward": memory.at_backward,
        "most in the update": of_rank.updating,
        "copied for a checkpoint": share_bytes(plan.job, plan.trained, plan.world, rank),
    }


def _traffic(rehearsed: Rehearsed, rank: int) -> list[Collective]:
    """Return what the plan counts for a rank, of its stage of a pipeline."""
    plan = rehearsed.plan
    stage = plan.job.mesh(plan.world).stage_of(rank)
    return collectives(plan.job, plan.trained, plan.world, stage)


def _of_stage(rehearsed: Rehearsed, rank: int) -> Memory:
    """Return what the plan counts for a rank, with the activations of its stage of a pipeline."""
    plan = rehearsed.plan
    part = parts_of(plan.job, plan.world)[plan.job.mesh(plan.world).stage_of(rank)]
    return replace(
        plan.chosen.memory,
        states=states(plan.job, plan.trained, plan.world, rank),
        activations=activations_of(plan.job, plan.machine.fused_norms, part),
    )


def rehearsed_memory(report: dict[str, Any]) -> dict[str, int]:
    """Return the same of a rank that was rehearsed, and the most in an evaluation."""
    peaks = report["peaks"]
    return {
        "between steps": report["between_bytes"],
        "most in forward and backward": max(peaks.get("forward", 0), peaks.get("backward", 0)),
        "most in the update": peaks.get("update", 0),
        "most in an evaluation": peaks.get("evaluation", 0),
        "copied for a checkpoint": report["saved_bytes"],
    }


def _memory(rehearsed: Rehearsed, report: dict[str, Any]) -> Block:
    memory, rows, at = _of_stage(rehearsed, report["rank"]), [], report["at_peak"]
    planned = planned_memory(rehearsed, report["rank"])
    for label, size in rehearsed_memory(report).items():
        expected = planned.get(label, 0)
        difference = f"{size / expected - 1:+.1%}" if expected else ""
        values = [in_unit(size, "GiB"), in_unit(expected, "GiB") if expected else "", difference]
        rows.append(Row("", label, values))
    after = []
    if abs(report["peak_bytes"] / memory.peak - 1) > NEAR:
        counted = (memory.activations.total if memory.activations else 0) + memory.states.gathered
        reduced = memory.states.gradients + memory.states.buckets
        after.append(
            f"At the peak {bytes_text(at.get('forward', 0))} were made in the forward pass, where "
            f"the plan counts {bytes_text(counted)} of activations, logits and gathered weights; "
            f"{bytes_text(at.get('backward', 0))} in the backward pass, where it counts "
            f"{bytes_text(reduced)} of gradients and buckets."
        )
        if report["compiled"] and not report["kernels"]:
            after.append(
                "The plan counts what kernels of compiled parts keep. Here their operations ran "
                "one by one, and made between them what a kernel doesn't."
            )
    columns = ("rehearsed", "planned", "difference")
    return Block("Memory, GiB", rows, columns, after=after)


def _largest(report: dict[str, Any]) -> Block:
    rows = []
    for each in report["largest"]:
        shape = " x ".join(f"{n:,}" for n in each["shape"])
        where = _end(each["place"])
        values = [in_unit(each["size"], "MiB"), each["dtype"], each["phase"], where]
        rows.append(Row("", shape, values))
    return Block(f"Largest tensors at the peak ({report['peak_phase']})", rows,
                 ("MiB", "type", "made in", "by"))  # fmt: skip


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


def _end(place: str) -> str:
    return place if len(place) <= _WIDEST else f"...{place[3 - _WIDEST :]}"


def _collectives(rehearsed: Rehearsed, report: dict[str, Any]) -> Block:
    planned: dict[tuple[str, int], list[int]] = {}
    for c in _traffic(rehearsed, report["rank"]):
        entry = planned.setdefault((c.kind, c.ranks), [0, 0])
        entry[0], entry[1] = entry[0] + c.payload, entry[1] + c.calls
    rows, counted = [], {(c["kind"], c["ranks"]): c for c in report["collectives"]}
    for kind, ranks in sorted(counted.keys() | planned.keys()):
        one = counted.get((kind, ranks), {"bytes": 0, "calls": 0})
        expected, calls = planned.get((kind, ranks), (0, 0))
        difference = one["bytes"] - expected
        text = "yes" if difference == 0 else f"{difference:+,}"
        if 0 < difference < _SMALL:
            text = f"yes, and {difference:,} of norm and summary"
        values = [f"{one['calls']:,}", f"{one['bytes']:,}", f"{calls:,}", f"{expected:,}", text]
        rows.append(Row("", f"{kind} of {ranks:,}", values))
    columns = ("calls", "bytes", "calls planned", "bytes planned", "equal")
    labels: dict[str, list[str]] = {}
    for c in rehearsed.plan.chosen.traffic:
        labels.setdefault(f"{c.kind} of {c.ranks:,}", []).append(c.label)
    several = len({ranks for _, ranks in planned}) > 1  # groups of ranks
    after = [f"{name}: {', '.join(of)}." for name, of in sorted(labels.items()) if several]
    return Block("Collectives of a step", rows, columns, after=after)


def _beside(report: dict[str, Any]) -> Block:
    rows, sizes = [], {(c["kind"], c["ranks"]): c["bytes"] for c in report["collectives"]}
    for one in report["beside"]:
        name, calls = (one["kind"], one["ranks"]), one["calls"]
        values = [flops_text(one["flops"] / calls), bytes_text(sizes[name])]
        rows.append(Row("", "{} of {:,}".format(*name), [*values, bytes_text(one["exposed"])]))
    exposed = bytes_text(sum(one["exposed"] for one in report["beside"]))
    after = [
        f"So much is computed between launch and wait of a collective; {exposed} need longer on "
        "the links, or are waited for at once."
    ]
    columns = ("products beside a call", "bytes", "exposed")
    return Block("Collectives beside the computation", rows, columns, after=after if rows else [])


def _waits(report: dict[str, Any]) -> Block:
    rows = [Row("", _end(w["place"]), [w["kind"], f"{w['times']:,}"]) for w in report["waits"]]
    after = [] if rows else ["The host never waits for the device."]
    return Block("Waits of the host in a step", rows, ("for", "times"), after=after)


def _operations(report: dict[str, Any]) -> Block:
    most = sorted(report["operations"], key=lambda one: -one["seconds"])[:10]
    rows = [Row("", _cut(one["name"]), [one["phase"], *_sums([one])]) for one in most]
    columns = ("in", "launches", "products", "moved", "ms")
    return Block("Most expensive operations of a step", rows, columns)


def _sums(operations: list[dict[str, Any]]) -> list[str]:
    """Return launches, FLOPs, bytes and milliseconds of operations."""
    times, flops, moved, seconds = (
        sum(one[key] for one in operations) for key in ("times", "flops", "bytes", "seconds")
    )
    return [f"{times:,.0f}", flops_text(flops), bytes_text(moved), f"{1e3 * seconds:,.2f}"]


def _part(operation: dict[str, Any]) -> str:
    """Return which part of the plan's law an operation belongs to."""
    name = operation["name"]
    if operation["phase"] in ("norm", "update"):
        return "update"
    # Inductor's elementwise kernels have the names of what is around them, too.
    if name.startswith(("triton_poi", "triton_red", "triton_per")):
        return "rest"
    if "dot_product" in name or "flex_attention" in name:
        return "attention"
    return "products" if operation["flops"] or "_mm" in name else "rest"


def _parts(rehearsed: Rehearsed, report: dict[str, Any]) -> Block:
    step, machine = rehearsed.plan.chosen.step, rehearsed.plan.machine
    parts: dict[str, list[dict[str, Any]]] = {}
    for one in report["operations"]:
        parts.setdefault(_part(one), []).append(one)
    law = {**step.parts, "all": step.computing or 0.0}
    parts = {name: parts.get(name, []) for name in (*sorted(parts.keys() | step.parts), "all")}
    parts["all"] = report["operations"]
    rows = [
        Row("", name, [*_sums(part), f"{1e3 * law[name]:,.2f}" if law.get(name) else ""])
        for name, part in parts.items()
    ]
    after = [
        f"By the roofline of {machine.name} an operation takes the longer of products and bytes; "
        f"the plan's law is fitted to speeds. On links the law has {1e3 * step.links:,.2f} ms, "
        f"of which {1e3 * step.waiting:,.2f} ms are waited for. The host needs "
        f"{1e3 * _launches(report) * machine.launch:,.2f} ms at {1e6 * machine.launch:.0f} us a "
        "launch."
    ]
    columns = ("launches", "products", "moved", "ms", "ms by the law")
    return Block("Computation of a step", rows, columns, after=after)


def _launches(report: dict[str, Any]) -> int:
    return round(sum(one["times"] for one in report["operations"]))


def _kernels(report: dict[str, Any]) -> Block:
    kernels = report["kernels"]
    worst = sorted(kernels, key=lambda k: (-k.get("stack", 0), -k.get("registers", 0)))[:5]
    rows = [
        Row("", _cut(k["name"]), [k["runs"], k.get("registers", "?"), k.get("stack", "?"),
                            f"{k['shared']:,}"])
        for k in worst
    ]  # fmt: skip
    after = [f"The compiler breaks a graph at {why.rstrip('.')}." for why in report["breaks"]]
    columns = ("runs", "registers", "spilled, bytes", "shared, bytes")
    return Block(f"Kernels ({len(kernels)} assembled), those that need most", rows, columns,
                 after=after)  # fmt: skip
