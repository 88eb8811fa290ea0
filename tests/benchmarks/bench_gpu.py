"""What a GPU does beside what was computed for it: `plan`'s and the rehearsal's bytes, seconds,
waits and launches of a step beside the measured ones, and plain PyTorch on the same work; what
train.deterministic costs; the ten most expensive kernels.

Needs a GPU (`--toy`: none), no data and no network. Writes runs/gpu.md, a table for READMEs, its
raw numbers as runs/gpu.json, and runs/gpu-trace-JOB.json.gz. Each part is a process with a limit of
time (tests/gpu/kit.py), and one that fails is a row that says so. Rehearsals run beside on the CPU.
"""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from forescale.config.compose import compose
from forescale.ground.storage import write_json
from forescale.plan.config import PlanJob
from forescale.plan.plan import Plan
from forescale.rehearsal.rows import rehearsed_memory
from tests.benchmarks.pairing import Result
from tests.gpu import kit
from tests.gpu.kit import Outcome, Part

TABLE = Path("runs/gpu.md")
_LIMIT, _TOTAL = 150, 570  # seconds of a part, and of all of them
_MACHINES = {"A100": "a100-80g", "H200": "h200", "B200": "b200"}  # by the GPU's name; else H100
_GIB = 2**30
_Row = tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """words: of `train`. ways: of plain PyTorch, "masters" or "autocast" (plain.py). ranks: each
    on a GPU."""

    name: str
    words: tuple[str, ...]
    ways: tuple[str, ...] = ("masters",)
    ranks: int = 1


@dataclass(frozen=True)
class Sizes:
    """steps: of a round. copied: bytes of the copy that measures the GPU's memory."""

    place: str
    steps: int
    copied: int
    jobs: tuple[Job, ...]


_COMMON = ("precision=bf16", "schedule.warmup=0")
REAL = Sizes("cuda", 4, 1 << 30, (
    Job("llama-1b", ("recipe=llama-1b", "train.global_batch=16", *_COMMON)),
    Job("llama-1b, not deterministic", ("recipe=llama-1b", "train.global_batch=16",
        "train.deterministic=false", *_COMMON), ()),
    Job("llama-7b, 4 layers", ("recipe=llama-7b", "model.num_layers=4", "train.global_batch=4",
        *_COMMON), ("masters", "autocast")),
    Job("mixtral-8x7b, 1 layer", ("recipe=mixtral-8x7b", "model.num_layers=1",
        "engine.expert_parallel=1", "train.global_batch=4", *_COMMON)),
))  # fmt: skip
MANY = Job("llama-1b, all GPUs", ("recipe=llama-1b", "engine=zero2", *_COMMON), ())
_TINY = ("model.width=64", "model.num_layers=2", "model.num_heads=4", "train.sequence_length=64",
         "train.micro_batch=2", "train.global_batch=4", "train.steps=9", "optimizer=adamw",
         "model.vocab_size=4096", "engine=zero1", *_COMMON)  # fmt: skip
TOY = Sizes("cpu", 1, 1 << 20, (
    Job("tiny", (*_TINY, "train.compile=off"), ("masters", "autocast")),
    Job("tiny, experts", (*_TINY, "model.mlp=moe", "train.deterministic=false"), ("masters",)),
))  # fmt: skip


@dataclass
class Measured:
    """The outcomes of a job's parts. seconds, mfu: of the plan's law."""

    job: Job
    seconds: float | None
    mfu: float | None
    rehearsal: dict[str, Any]
    engine: Outcome
    plain: dict[str, Outcome]
    problems: list[str]


def parts(sizes: Sizes, rounds: int, trace: str = "") -> dict[str, Part]:
    """Return all parts by name: the device, and of each job ours and the ways of plain PyTorch."""
    every = {"device": Part("gpu.parts:device", {"size": sizes.copied})}
    for job in sizes.jobs:
        common = {"words": [*job.words], "steps": sizes.steps, "rounds": rounds}
        path = f"{trace}-{re.sub('[ ,]+', '-', job.name)}.json.gz" if trace else ""
        every[job.name] = Part("gpu.parts:engine_steps", common | {"trace": path}, job.ranks)
        for way in job.ways:
            every[f"{job.name}, {way}"] = Part("gpu.parts:plain_steps", common | {"way": way})
    return every


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    began, outcomes = time.monotonic(), dict[str, Outcome]()
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    trace = str(TABLE.absolute().with_name("gpu-trace"))
    todo = parts(sizes, rounds, trace)

    def run(name: str) -> Outcome:
        left = began + _TOTAL - time.monotonic()
        if left < 20:
            return Outcome(None, f"not run: {_TOTAL} s were over", 0.0)
        print(f"    {name} ...", flush=True)
        return kit.run(sizes.place, [todo[name]], min(_LIMIT, int(left)))[0]

    outcomes["device"] = run("device")
    device = outcomes["device"].value
    if device is None:
        problem = outcomes["device"].problem
        raise SystemExit(f"gpu: the GPU can't be used (--toy needs none): {problem}")
    if (gpus := min(8, device.get("gpus", 1))) > 1:
        many = replace(MANY, ranks=gpus, words=(*MANY.words, f"train.global_batch={16 * gpus}"))
        sizes = replace(sizes, jobs=(*sizes.jobs, many))
        todo = parts(sizes, rounds, trace)
    machine = next((m for kind, m in _MACHINES.items() if kind in device["gpu"]), "h100-sxm")
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 4)) as pool:
        rehearsals = [pool.submit(_rehearsed, job, machine, began + _TOTAL) for job in sizes.jobs]
        outcomes |= {name: run(name) for name in [*todo][1:]}
    pairs = zip(sizes.jobs, rehearsals, strict=True)
    measured = [_of_job(job, outcomes, facts, machine) for job, facts in pairs]
    text = table(device, measured)
    TABLE.write_text(text)
    write_json(TABLE.with_suffix(".json"), {"device": device, "jobs": [*map(asdict, measured)]})
    print(text)
    facts = {"table": str(TABLE)} | {name: f"{o.seconds:.1f} s" for name, o in outcomes.items()}
    row = (time.monotonic() - began,)
    whole = Result("gpu, all parts", "s", ("total",), [row], f"at most {_TOTAL}", facts)
    return [*_results(measured), whole]


def _planned(job: Job, machine: str) -> list[str]:
    return [*job.words, f"plan.gpus={job.ranks}", f"machine={machine}"]


def _rehearsed(job: Job, machine: str, end: float) -> tuple[dict[str, Any], str | None]:
    """Return the JSON of a rehearsal, or why there is none."""
    command = [sys.executable, "-m", "forescale", "rehearse", "--json", *_planned(job, machine)]
    how: Any = {"capture_output": True, "text": True, "env": kit.environment("cpu")}
    try:
        done = subprocess.run(command, timeout=max(1, end - time.monotonic()), **how)
    except subprocess.TimeoutExpired:
        return {}, "its rehearsal did not end in time"
    if done.returncode:
        return {}, f"its rehearsal ended with {done.returncode}: {done.stderr[-500:]}"
    return json.loads(done.stdout), None


def _of_job(job: Job, outcomes: dict[str, Outcome], rehearsal: Future, machine: str) -> Measured:
    facts, problem = rehearsal.result()
    step = Plan(compose(PlanJob, _planned(job, machine))).chosen.step
    plain = {way: outcomes[f"{job.name}, {way}"] for way in job.ways}
    every = {"ours": outcomes[job.name], **{f"plain, {way}": o for way, o in plain.items()}}
    problems = [f"{k}: {o.problem}" for k, o in every.items() if o.problem]
    problems += [problem] if problem else []
    return Measured(job, step.seconds, step.mfu, facts, every["ours"], plain, problems)


def table(device: dict[str, Any], measured: list[Measured]) -> str:
    """Return the table in Markdown, and the most expensive kernels of each job."""
    head: _Row = ("job", "a step's", "plan", "rehearsed", "measured", "plain PyTorch")
    rows = [head, ("---",) * len(head)]
    for one in measured:
        rows += _rows(one)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    copy, flops = device["copy_bytes_per_second"] / 1e9, device["matmul_flops"] / 1e12
    lines.append(
        f"\n{device['gpu']}, torch {device['torch']}: products of {flops:,.1f} TFLOP/s, copies of "
        f"{copy:,.1f} GB/s, a launch each {1e6 * device['launch_seconds']:.1f} us."
    )
    for one in measured:
        for problem in one.problems:
            lines.append(f"\n{one.job.name}: {' '.join(problem.split())[-400:]}")
        if value := one.engine.value:
            lines.append(f"\nDearest kernels of {one.job.name}:\n\n| ms | launches | kernel |")
            lines.append("| --- | --- | --- |")
            lines += [
                f"| {1e3 * k['seconds']:.2f} | {k['times']:g} | {k['name'][:90]} |".replace("`", "")
                for k in value["kernels"]
            ]
    return "\n".join(lines) + "\n"


def _rows(one: Measured) -> list[_Row]:
    """Return the rows of a job; one that says so where its measurement failed."""
    name, value = one.job.name, one.engine.value
    report = (one.rehearsal.get("ranks") or [{}])[0]
    operations = report.get("operations") or []
    roofline = sum(each["seconds"] for each in operations) or None
    step = median(value["seconds"]) if value else None
    failed = "failed, see below"

    def mfu(seconds: float | None) -> float | None:
        return one.mfu * one.seconds / seconds if one.mfu and one.seconds and seconds else None

    def beside(text: Any) -> str:
        return "; ".join(
            f"{text(median(o.value['seconds'])) if o.value else failed} ({way})"
            for way, o in one.plain.items()
        )

    rows = [
        (name, "ms", _ms(one.seconds), _ms(roofline), _ms(step) if value else failed, beside(_ms)),
        (name, "MFU", _share(one.mfu), _share(mfu(roofline)), _share(mfu(step)),
         beside(lambda s: _share(mfu(s)))),
    ]  # fmt: skip
    planned = (one.rehearsal.get("planned", {}).get("memory_bytes") or [{}])[0]
    rehearsed = rehearsed_memory(report) if operations else {}
    memory = value["memory_bytes"] if value else {}
    for label in ("between steps", "most in forward and backward", "most in the update"):
        sides = (planned, rehearsed, memory)
        cells = [f"{side[label] / _GIB:.2f}" if label in side else "" for side in sides]
        rows.append((name, f"GiB {label}", *cells, ""))
    waits = sum(each["times"] for each in report.get("waits", []))
    launches = round(sum(each["times"] for each in operations))
    for label, count, key in (("waits", waits, "waits"), ("launches", launches, "launches")):
        cell = f"{value[key]:,g}" if value else ""
        rows.append((name, label, "", f"{count:,}" if operations else "", cell, ""))
    return rows


def _ms(seconds: float | None) -> str:
    return f"{1e3 * seconds:,.1f}" if seconds else ""


def _share(value: float | None) -> str:
    return f"{100 * value:.1f} %" if value else ""


def _results(measured: list[Measured]) -> list[Result]:
    results = []
    for one in measured:
        name, value = f"gpu, {one.job.name}", one.engine.value
        if value is None:
            continue
        rows = [(1e3 * seconds,) for seconds in value["seconds"]]
        results.append(Result(name, "ms a step", ("ours",), rows))
        for way, outcome in one.plain.items():
            if outcome.value:
                pairs = zip(outcome.value["seconds"], value["seconds"], strict=True)
                speeds = [(1 / engine, 1 / other) for other, engine in pairs]
                labels = ("ours", f"plain PyTorch, {way}")
                results.append(Result(f"{name}, {way}", "steps/s", labels, speeds))
    return results
