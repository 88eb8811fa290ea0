"""`study plan`: what a study would run, what that costs, and how sure it would be of its target.

    studies/<name>/plan.json        every cell with its keys and costs, and the interval to expect
    studies/<name>/stage-1.txt      a line of key=value words a cell: for `submit slurm.runs=`

Invariant: nothing is launched here, and nothing is written that costs more than the cap.
"""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from models.config import ModelConfig
from trainer.compose import compose
from trainer.config_study import StudyJob
from trainer.durable import write_file, write_json
from trainer.errors import UserError
from trainer.overview import table
from trainer.scaling.design import Cell, Grid, Plan, isoflop_grid, ladder
from trainer.scaling.shapes import Common
from trainer.scaling.simulate import Design, Expected, Target, expected

_SECONDS_AN_HOUR = 3600.0


def plan(job: StudyJob) -> tuple[Plan, Expected | None]:
    """The design, and what it would be worth at the target, if one is given. Raises UserError where
    it can't be had for the cap."""
    asked = job.plan
    if asked.cap is None:
        raise UserError("plan.cap", "is not given", "write plan.cap=1e16: FLOPs that may be spent")
    base = compose("train", [f"model={asked.model}"]).model
    if not isinstance(base, ModelConfig):
        raise UserError("plan.model", f"{asked.model} has no sizes of ours", "choose another model")
    common = Common(
        base,
        asked.vocab_size,
        asked.sequence_length,
        size=job.size,
        cost=job.cost,
        micro_batch=asked.micro_batch,
        seed=job.seed or 1337,
        rate=asked.rate,
        unique=asked.unique,
    )
    if asked.kind == "ladder":
        made = ladder(common, asked.ladder, asked.multiples, asked.cap)
    else:
        grid = Grid.under(asked.cap, asked.budgets, asked.sizes)
        made = isoflop_grid(common, grid, asked.cap)
    t = job.target
    if not t.is_given:
        return made, None
    target = Target.of(common, t.flops, t.parameters, t.tokens)
    return made, expected(Design.of(made), target, seed=job.seed)


def write(made: Plan, sure: Expected | None, folder: Path) -> list[Path]:
    """plan.json, and the lines of each stage that is exact."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [_plain(cell) for cell in made.cells]
    facts = {"kind": made.kind, "cap": made.cap, "low": made.low, "high": made.high}
    write_json(
        folder / "plan.json",
        {**facts, "cells": cells, "expected": asdict(sure) if sure else None},
    )
    written = [folder / "plan.json"]
    for stage in made.stages:
        if stage.exact:
            path = folder / f"stage-{stage.number}.txt"
            # Those that await others come when the others' losses are known.
            lines = [_words(cell) for cell in stage.cells if not cell.awaits and not cell.trunk]
            write_file(path, ("\n".join(lines) + "\n").encode())
            written.append(path)
    return written


def _plain(cell: Cell) -> dict[str, Any]:
    return {
        "name": cell.name,
        "stage": cell.stage,
        "role": cell.role,
        "parameters": cell.shape.parameters,
        "tokens": cell.tokens,
        "flops": cell.flops,
        "cost": cell.cost,
        "seconds": cell.seconds,
        "flags": list(cell.flags),
        "awaits": list(cell.awaits),
        "keys": cell.keys,
    }


def _words(cell: Cell) -> str:
    def text(value: Any) -> str:
        return "null" if value is None else str(value)

    return shlex.join(f"{key}={text(value)}" for key, value in cell.keys.items())


def show(made: Plan, sure: Expected | None, console: Console) -> None:
    """Print the page."""
    n = len(made.cells)
    console.print(
        f"{made.kind}: {n} runs in {len(made.stages)} stages; at most {made.high:.3g} of "
        f"{made.cap:.3g} FLOPs"
    )
    console.print()
    console.print(_stages(made))
    console.print()
    console.print(_cells(made.stages[0].cells))
    if sure is not None:
        half, bare = sure.half, sure.bare
        console.print(
            f"\nTarget {sure.beyond:.3g} times beyond the dearest run: expected ± {half[0.5]:.1%} "
            f"(50%), ± {half[0.9]:.1%} (90%); of it the runs' noise {bare[0.5]:.1%}, "
            f"{bare[0.9]:.1%}: more runs narrow that alone, dearer ones both. From {sure.draws} "
            "made-up surfaces; seed noise and tuning gap are assumed until stage 1 measures them.",
            soft_wrap=True,
        )
    flags = Counter(flag for cell in made.cells for flag in cell.flags)
    for flag, count in flags.most_common():
        console.print(f"[yellow]Note:[/] {count} of {n} runs: {flag}.", soft_wrap=True)
    for note in made.notes:
        console.print(f"[yellow]Note:[/] {note}.")


def _stages(made: Plan) -> Table:
    rows = table("stage", "budget", "runs", "FLOPs", "device-hours")
    rate = made.common.rate
    for stage in made.stages:
        ends = (stage.low, stage.high)
        cost = f"{ends[0]:.3g}" if stage.exact else f"{ends[0]:.3g} to {ends[1]:.3g}"
        hours = f"{ends[1] / rate / _SECONDS_AN_HOUR:,.2f}" if rate else "-"
        budget = f"{stage.budget:.3g}" if stage.budget else "-"
        rows.add_row(str(stage.number), budget, str(len(stage.cells)), cost, hours)
    return rows


def _cells(cells: Sequence[Cell]) -> Table:
    names = (
        "run",
        "for",
        "N",
        "layers x width",
        "tokens",
        "D/N",
        "steps",
        "batch",
        "rate",
        "FLOPs",
    )
    rows = table(*names, "FLOPs", left=("run", "for"))
    for c in cells:
        s = c.shape.model.sizes
        rows.add_row(
            c.name,
            c.role,
            f"{c.shape.parameters:,}",
            f"{s.num_layers} x {s.width}",
            f"{c.tokens:,}",
            f"{c.tokens / c.shape.parameters:.0f}",
            f"{c.steps:,}",
            str(c.global_batch),
            "awaits" if c.awaits else f"{c.learning_rate:.2g}",
            f"{c.cost:.2e}",
        )
    return rows
