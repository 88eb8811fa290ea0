"""The parts of a rehearsed attempt: those of train/build.py, in the directory of a run that nobody
keeps.

Invariant: guard, self-check, metrics, callbacks, evaluation, saves and loads are the job's own
code. Replaced is what other ranks and files would answer, and of what is repeated one is made: a
micro-batch of an evaluation, a question of an ability, two replays of the self-check.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from forescale.checkpoint import saver
from forescale.config.sections.outer import OuterConfig
from forescale.config.sections.runtime import LoggingConfig
from forescale.engine import selfcheck
from forescale.engine.portable import fragments
from forescale.engine.portable.fragments import FragmentReader
from forescale.engine.ranks import Ranks
from forescale.engine.state import load_fragments, scalars
from forescale.engine.step import Engine
from forescale.engine.world import StepSummary, World
from forescale.ground.storage import FileEntry, HashingFile
from forescale.rehearsal.config import RehearseJob
from forescale.rehearsal.observer import Observer
from forescale.resilience.phases import PhaseTimer
from forescale.run.directory import Run
from forescale.run.feed import objective_of, whole_rows_of
from forescale.run.references import References
from forescale.train import build
from forescale.train.build import Builder, Parts
from forescale.train.callbacks import Step, UserCallback
from forescale.train.guard import Anomaly
from forescale.train.preferences import SPLITS
from forescale.train.resume import Position, ResumePoint


def reduced(job: RehearseJob, reads_data: bool) -> RehearseJob:
    """Return a job that evaluates a micro-batch and sends nothing to trackers."""
    of_an_evaluation = job.train.micro_batch * job.mesh(job.world_size).data
    names = job.validation.abilities if reads_data else []  # the questions need a tokenizer
    prompts = job.validation.prompts[:1] if reads_data else []
    few = replace(job.validation, windows=of_an_evaluation, questions=1, abilities=names)
    few = replace(few, prompts=prompts, prompt_tokens=1)
    return replace(
        job,
        validation=few,
        data=replace(job.data, workers=0),  # fake tensors are those of one thread
        outer=OuterConfig(),  # there are no other clusters
        guard=replace(job.guard, corruption="note"),  # no two replays are equal, without values
        logging=LoggingConfig(peak_flops=job.logging.peak_flops or job.machine.peak_bf16),
    )


def answer_for_others() -> None:
    """Let a rank receive its own values from each other rank and decide as rank 0 does, and let
    files take what is written to them."""
    replaced: list[Any] = [Ranks, World, UserCallback, fragments, saver]
    ranks, world, callback, files, saves = replaced
    ranks.gather = ranks.gather_to_main = lambda self, value: [value] * self.size
    ranks.from_main = lambda self, work, where=None: work()
    ranks.broadcast = lambda self, value: value
    world.in_background = lambda self, *_, **__: Ranks(self.rank, self.size)
    world.new_tree = lambda self, timeout=None: None  # it would connect to them
    summaries, see = world.summaries, callback.see

    def going_on(self: World, behind: int) -> Iterator[StepSummary]:
        for summary in summaries(self, behind):
            yield replace(summary, stop=False, failed=False)

    def seeing(self: UserCallback, step: Step, summary: StepSummary) -> None:
        with suppress(Anomaly):  # it has its reason in a value
            see(self, step, summary)

    world.summaries, callback.see = going_on, seeing
    files.HashingFile, saves.write = _Nowhere, _write
    selfcheck.REPLAYS = 2


class _Nowhere(HashingFile):
    """A file of which nothing is written."""

    def __init__(self, path: Path, beside: bool = False):
        super().__init__(Path(os.devnull))

    def write(self, data: bytes | memoryview) -> int:
        self.size += memoryview(data).nbytes
        return self.size

    def finish(self) -> FileEntry:
        return FileEntry(self.size, "")


def _write(run: Run, attempt: int, snapshot: Any, *_: Any) -> int:
    """Return the bytes of a rank's fragments; the begin of each is read for its file."""
    begins = [replace(each, data=each.data[: 1 << 20]) for each in snapshot.fragments]
    fragments.write_fragments(run.path, begins)
    return sum(fragment.data.nbytes for fragment in snapshot.fragments)


def parts_of(
    job: RehearseJob,
    sources: Any,
    vocabulary: int,
    engine: Engine,
    phases: PhaseTimer,
    folder: Path,
) -> Parts:
    """Return the parts of the first attempt of a run in a folder. sources: of the data; None: the
    parts have no batches and no held-out text."""
    run, references, loops = Run(folder), None, cast(Any, build)
    loops.complete = lambda *_: {}  # what trackers are told
    if sources is None:
        names: dict[str, Any] = {}
        lacks = {"split": lambda name: names, "tokenizer": None}
        sources = SimpleNamespace(vocab_size=vocabulary, **lacks)
        columns = SimpleNamespace(sequence_length=job.train.sequence_length)
        feed: dict[str, Any] = {"names": [], "bins": None, "are_whole": False, "substitute": False}
        feed |= {"mixture": columns, "objective": objective_of(job, vocabulary)}
        loops.feed_of = lambda *_, **__: SimpleNamespace(**feed)
    elif job.objective.are_preferences:  # their numbers are values
        references = References({}, {split: _references(job, sources, split) for split in SPLITS})
    numerics = {"exact": job.train.deterministic}
    builder = Builder(
        job, run, sources, engine.module, engine, phases, numerics, None, None, references
    )
    attempt, point = run.new_attempt(), ResumePoint(Position())
    attempt.start_from(point.parent, run)
    parts = builder.parts(attempt, point)
    guard: Any = parts.guard
    guard._replay = guard._replay and (1,)  # its first step is a rehearsed one
    return parts


def _references(job: RehearseJob, sources: Any, split: str) -> dict[str, np.ndarray]:
    bins = whole_rows_of(job, sources, split)
    return {name: np.zeros((int(b.counts.sum()), 2), "f4") for name, b in bins.items()}


class _Stored(FragmentReader):
    """A checkpoint without values. moments: the names of those of each parameter."""

    def __init__(self, moments: dict[str, list[str]]):
        self._moments = moments

    def states(self, name: str) -> list[str]:
        return self._moments.get(name, [])

    def read_into(self, name: str, state: str, start: int, out: Tensor) -> None:
        out.copy_(torch.empty(out.numel()))

    def fill(self, fragment: fragments.Fragment) -> None:
        if fragment.cut is not None:  # each row is a copy of its own, like all others
            fragment = replace(fragment, data=fragment.data[: 4 * fragment.cut[0]])
        super().fill(fragment)


def load_weights(engine: Engine) -> None:
    """Load the weights of another run, as a branch and a fine-tuning begin."""
    load_fragments(engine, _Stored({}), None)


def resume(engine: Engine) -> None:
    """Load all states, as a process that resumes does, whose optimizer has none yet."""
    base, moments = engine.layout.base, dict[str, list[str]]()
    for unit in engine.layout.units():
        states = base.state.get(unit.master, {}).items()
        names = [name for name, value in states if torch.is_tensor(value) and value.dim()]
        moments |= {engine.names[piece.param]: names for piece in unit.pieces}
    counters = scalars(engine)
    base.state.clear()
    load_fragments(engine, _Stored(moments), counters)


def overflow(engine: Engine, batch: Any, observer: Observer) -> None:
    """Make a step in fp16 whose gradient overflows, so that the loss scale is lowered."""
    changed: Any = engine
    measure = engine.measure

    def infinite(losses: Tensor, targets: int) -> tuple[float, float]:
        loss, _ = measure(losses, targets)
        engine.layout.norm = math.inf
        return loss, math.inf

    changed.measure = infinite
    observer.integer = 1  # what DeepSpeed reads of its own look at the gradients
    facts = engine.train_step(batch, 1.0)
    observer.integer, changed.measure = 0, measure
    assert not facts.applied, "the weights are updated though the gradient overflows"
