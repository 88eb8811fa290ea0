"""A dataset and a run of a few steps, made without an engine, for the tests of the small verbs.

The checkpoints have two ranks' files, written by the product's own writer from a plain module.
"""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from forescale.config.compose import compose
from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.data.feed import Feed
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.text.files import Files
from forescale.engine.portable.fragments import WEIGHT, Fragment, write_fragments
from forescale.ground.storage import read_json, write_json, write_table
from forescale.monitor.audit import feed_of_run
from forescale.run.certificate import Certificate, keys_of, versions_of
from forescale.run.directory import Attempt, Parent, Run
from forescale.run.rows import RowWriter, read_rows
from forescale.run.start import start
from forescale.train.model import build_model

LENGTH, BATCH, STEPS = 32, 4, 8
SHIFT = 0.002
TEXT = [
    "def main(argument):\n    return 'naïve' + str(argument)\n",
    "for name in ('数据', '🙂'):\n    print(name)\n",
    "class Model:\n    width = 32\n    depth = 1\n",
]


def make_dataset(path: Path, vocab_size: int = 300) -> Path:
    """40 documents of some hundred bytes each, with multi-byte characters."""
    folder = path.with_name("text")
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(40):
        (folder / f"{i:02}.py").write_text("".join(TEXT[: 1 + i % 3]) * 3 + f"# {i}\n")
    config = BuildConfig(vocab_size=vocab_size, validation=0.2)
    return build_dataset(Files([folder]), path, config)


def make_job(dataset: Path, root: Path, name: str = "small", *overrides: str):
    sizes = ["num_layers=1", "width=32", "num_heads=2", "mlp=relu2"]
    return compose(
        TrainJob,
        [
            f"run.name={name}",
            f"run.root={root}",
            f"data.path={dataset}",
            f"train.steps={STEPS}",
            f"train.sequence_length={LENGTH}",
            f"train.global_batch={BATCH}",
            f"train.micro_batch={BATCH}",
            "schedule.warmup=1 steps",
            *([f"model.{size}" for size in sizes] if not overrides else []),
            *overrides,
        ],
    )


def make_run(dataset: Path, root: Path, name: str = "small", *overrides: str) -> Run:
    """A complete run: one attempt, a row a step, a validation row, checkpoints at 4 and 8.

    Each checkpoint's weights are the initial ones plus SHIFT a step.
    """
    started = start(make_job(dataset, root, name, *overrides))
    run, attempt = started.run, started.run.new_attempt()
    attempt.start_from(Parent(0), run)
    module = build_model(started.job, started.sources.vocab_size)
    with torch.no_grad():
        for step in range(1, STEPS + 1):
            attempt.metrics.add(train_row(attempt, step))
            if step % 4 == 0:
                for p in module.parameters():
                    p += 4 * SHIFT
                save(run, attempt, step, module)
    attempt.metrics.add(validation_row(attempt, STEPS))
    return run


def feed(run: Path) -> Feed:
    """What a run reads."""
    return _feed(run.resolve())  # many tests have a run of their own at runs/small


@cache
def _feed(run: Path) -> Feed:
    job, identity = thaw(TrainJob, run / "config.yaml", True), read_json(run / "run.json")
    return feed_of_run(job, identity, (), trust=True)


def change_rows(path: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    """Put the rows of a file through `change`, as if they had been written so."""
    changed = RowWriter(path.with_name("changed.jsonl"))
    for row in change(read_rows(path)):
        changed.add(row)
    path.write_bytes(changed.path.read_bytes() if changed.path.exists() else b"")
    changed.path.unlink(missing_ok=True)


def tokens(attempt: Attempt, step: int) -> int:
    """Targets of the steps so far."""
    return int(feed(attempt.path.parents[1]).targets([(0, step * BATCH)]).sum())


def train_row(attempt: Attempt, step: int) -> dict:
    samples = ((step - 1) * BATCH, step * BATCH)
    data = feed(attempt.path.parents[1])
    return {
        "kind": "train",
        "step": step,
        "attempt": attempt.number,
        "g0": samples[0],
        "g1": samples[1],
        "tokens": tokens(attempt, step),
        "shares": dict(zip(data.names, data.targets([samples]).tolist(), strict=True)),
        "tokens_hash": data.read([samples]).hash,
        "loss": 6.0 / step,
        "seconds": {"data": 0.5, "compute": 1.5},
    }


def validation_row(attempt: Attempt, step: int) -> dict:
    row = {"kind": "validation", "step": step, "attempt": attempt.number, "dataset": "validation"}
    score = {"loss": 3.0, "loss_stderr": 0.1, "bits_per_byte": 2.25, "windows": 7}
    return {**row, "tokens": tokens(attempt, step), **score}


def save(
    run: Run, attempt: Attempt, step: int, module: torch.nn.Module, facts: dict | None = None
) -> Path:
    """A checkpoint as two ranks would write it: each parameter cut at a third."""
    path = run.checkpoint_path(step)
    path.mkdir(parents=True)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    table, fragments = {}, {}
    for rank in range(2):
        file = f"rank-{rank:05d}.safetensors"
        owned = [_part(name, p, rank) for name, p in module.named_parameters()]
        table[file], fragments[file] = write_fragments(path / file, owned)
    state = {
        "format": 3,  # each fragment has a row, by file
        "position": {"step": step, "g": step * BATCH, "tokens": tokens(attempt, step)},
        "attempt": attempt.number,
        "world_size": 2,
        "numerics": {"stage": 1},
        "logged": {f.path.name: vars(f.state()) for f in (attempt.metrics, attempt.events)},
        "counters": {},
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "fragments": fragments,
        **(facts or {}),
    }
    table["state.json"] = write_json(path / "state.json", state)
    write_table(path, table)
    attempt.event("checkpoint_saved", step=step)
    return path


def _part(name: str, parameter: torch.Tensor, rank: int) -> Fragment:
    cut, size = parameter.numel() // 3, math.prod(parameter.shape)
    first, end = ((0, cut), (cut, size))[rank]
    data = parameter.detach().reshape(-1)[first:end]
    return Fragment(name, tuple(parameter.shape), WEIGHT, first, data)


def train_a_step(run):
    """Write what an attempt leaves that has made one step."""
    attempt = run.new_attempt()
    attempt.start_from(Parent(0), run)
    attempt.metrics.add({"kind": "train", "step": 1, "attempt": attempt.number})


def certify(job: TrainJob, gpus: dict[str, Any], peak: int = 3 << 30, at: float = 0.0) -> Path:
    """Write the certificate of a rehearsal of a job."""
    return Certificate(
        time=at,
        keys=keys_of(job),
        gpus=gpus,
        versions=versions_of(job),
        ranks=[0, 7],
        peak_bytes=peak,
        planned_bytes=4 << 30,
        waits=1,
        launches=1234,
        equal_collectives=True,
        kernels=0,
        limits="",
    ).write()
