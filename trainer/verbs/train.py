"""`forescale train`: start the local ranks of a run; or, started as a rank, be one.

Invariant: the same command again resumes the run, whatever ended it. Ranks of our own launchers
read the frozen config in the run directory, which the command has compared and written before.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event

from forescale.checkpoint.choice import newest_step
from forescale.checkpoint.mirror import mirror_of
from forescale.checkpoint.restore import restore
from forescale.checkpoint.retention import hold
from forescale.config.frozen import thaw
from forescale.config.hardware import check_fp8, check_fp16, has_gpu
from forescale.config.job import overrides_of
from forescale.config.schema import ConfigError, Problem
from forescale.config.sizes import in_words
from forescale.config.target import CELL, STORED, refuse_targets, remember, targets
from forescale.config.train import TrainJob
from forescale.engine.deepspeed_check import problems_apart
from forescale.ground.document import is_json, tell_line
from forescale.ground.errors import DONE, UserError
from forescale.resilience import forking, launcher, template
from forescale.resilience.elastic import LocalSize, LocalSizes
from forescale.resilience.outcome import notify, report_error
from forescale.run.command import job_of
from forescale.run.directory import Run
from forescale.run.feed import epochs, feed_of, notes
from forescale.run.rows import RowReader
from forescale.run.start import Start, start
from forescale.train.probe import examine_apart
from forescale.verbs import load

_FROZEN = "--frozen"
_TRUST = "trust=true"
_EVERY = 0.5  # seconds between two looks for new rows


JOB = TrainJob
EXAMPLES = (
    "train",
    "train experiment=quick",
    "train optimizer=adamw optimizer.learning_rate=1e-3 run.name=slower",
    "train data=dataset data.path=/data/books recipe=llama-160m train.tokens=3e9",
    "train model._target_=mypackage.Model model.width=256 run.name=mine",
)


def main(words: list[str]) -> int:
    """Returns 0 when the run is complete, 75 when it was interrupted, 76 when it keeps crashing."""
    began = time.monotonic()
    is_stored, is_cell = STORED in words, CELL in words
    words = [word for word in words if word not in (STORED, CELL)]
    from_run: list[str] = []
    if _FROZEN in words:
        job = _frozen(words)
    else:
        job = job_of(TrainJob, overrides_of(TrainJob, words), notes=from_run)
    refuse_targets(job, trust=not is_stored)
    if channel := forking.requested():
        _import(job)
        forking.serve(channel, launcher.STOP_SIGNALS)
        began = time.monotonic()
    if launcher.started_as_rank():
        return _rank(job, began)
    if restore(job, print):
        job = job_of(TrainJob, overrides_of(TrainJob, words))  # over its config, as for any run
    sizes = local_sizes(job, print)
    processes = sizes.choose().ranks
    check(job, processes)
    for note in (*from_run, *job.notes()):
        print(f"Note: {note}")
    if launcher.asked_of_accelerate():
        print(f"Note: accelerate launch has started one process; it starts {processes} ranks.")
    started = start(job, examine=examine_apart, newest=newest_step)
    mirror = mirror_of(started.run, started.job, print)
    if mirror:
        mirror.check().start()
    if not is_stored:
        remember(started.job, started.run.path)
    _introduce(started, sizes.now)
    facts = {"run": started.run.name, "path": started.run.path, "ranks": processes}
    lengths = {"steps": job.total_steps, "tokens_per_step": job.tokens_per_step}
    tell_line({"kind": "started", **facts, **lengths})
    for note in (*started.notes, *hold(started.run, started.job.run.origin, started.job.run.root)):
        print(f"Note: {note}", flush=True)
    trust = [_TRUST] if targets(job) else []  # the user has just named them
    command = [sys.executable, "-P", "-m", "forescale", "train", str(started.run.path.absolute())]
    grace = job.launch.grace.seconds or 0.0
    stop = launcher.StopRequest()
    command = [*command, _FROZEN, *trust]
    ranks = template.Template(command)
    try:
        with _rows_for_programs(started.run):
            code = launcher.run_attempts(started.run, command, sizes, grace, stop, ranks)
    finally:
        ranks.end()
        if mirror:  # also of an interrupted run, whose last save may be needed elsewhere
            mirror.close(lambda: time.monotonic() > stop.deadline)
    how = launcher.last_end(started.run)
    notify(started.run, code, how, print)
    tell_line({"kind": "ended", "exit_code": code, "how": how, "path": started.run.path})
    if code == DONE and not is_cell and not is_json():
        with first_imports():
            from forescale.inference.summary import summarize

        summarize(started, load("generate").main)
    return code


@contextmanager
def _rows_for_programs(run: Run) -> Iterator[None]:
    """Within the block, with --json, print the rows that new attempts of a run write to their
    metrics, soon after they are written."""
    earlier = {attempt.number for attempt in run.attempts()}
    readers: dict[tuple[int, str], RowReader] = {}
    is_over = Event()

    def follow() -> None:
        goes_on = True
        while goes_on:
            goes_on = not is_over.wait(_EVERY)
            for number, path in ((a.number, a.path) for a in run.attempts()):
                for kind in ("train", "validation") if number not in earlier else ():
                    file = path / run.metrics.name
                    reader = readers.setdefault((number, kind), RowReader(file, kind))
                    with suppress(UserError, OSError):  # training itself reports a damaged file
                        for row in reader.read():
                            if row.get("attempt") == number:  # not the history of earlier ones
                                tell_line(row)

    with ThreadPoolExecutor(1) as pool:
        if is_json():
            pool.submit(follow)
        try:
            yield
        finally:
            is_over.set()


def _frozen(arguments: list[str]) -> TrainJob:
    """Return the job in a run's directory, from the arguments RUN --frozen, and trust=true if it
    names a class of the user's own. Ranks use this, in a queue perhaps months later."""
    names = [argument for argument in arguments if argument not in (_FROZEN, _TRUST)]
    if len(names) != 1 or ("=" in names[0] and not Path(names[0]).exists()):
        todo = f"write forescale train RUN {_FROZEN}, and nothing else"
        raise UserError(" ".join(arguments), "is not one run", todo)
    run = Run.existing(names[0])
    job = thaw(TrainJob, run.config, trust=_TRUST in arguments)
    where = run.path.resolve()
    if job.run.directory.resolve() == where:
        return job
    # The directory was moved, or a relative run.root was typed elsewhere.
    return replace(job, run=replace(job.run, name=where.name, root=str(where.parent)))


@contextmanager
def first_imports() -> Iterator[None]:
    """Keep Python's garbage collector out of the imports inside, if torch is still to be imported.

    Nothing that they make is garbage, and there are a million objects: to search them again and
    again took a fifth of the time, and later collections searched them all. None will do so now.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _import(job: TrainJob) -> None:
    """Import what a rank imports, also later, and leave the environment as it is."""
    before = dict(os.environ)
    with first_imports():
        from forescale.engine.world import import_libraries

        import_libraries(compiler=job.train.compile != "off")
        import forescale.train.trainer  # noqa: F401
    os.environ.clear()
    os.environ.update(before)


def _rank(job: TrainJob, began: float) -> int:
    with first_imports():
        from forescale.engine.world import lost_peer, set_environment

        set_environment()
        from forescale.plan.oom import explained
        from forescale.train.trainer import run_rank

    try:
        with explained(job):
            code = run_rank(job, began)
    except BaseException as e:
        attempt = os.environ.get(launcher.ATTEMPT)
        code = report_error(
            Path(attempt) if attempt else None,
            int(os.environ["RANK"]),
            e,
            isinstance(e, Exception) and lost_peer(e),
        )
    # Worker threads of the libraries may delay a normal exit, and the other ranks wait in a
    # collective for a rank that exits slowly; everything is on disk.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check(job: TrainJob, processes: int) -> None:
    """Raise UserError if the job does not fit so many ranks of this machine, or if DeepSpeed
    refuses its settings."""
    problems = [Problem(*p) for p in job.problems(world_size=processes)]
    if problems := problems or problems_apart(job, processes):
        raise ConfigError(problems)
    check_fp8(job.precision.fp8)
    check_fp16(job.precision.kind, has_gpu())


def local_ranks(job: TrainJob) -> int:
    """Return how many ranks a plain start of the job begins with on this machine."""
    return local_sizes(job, lambda line: None).choose().ranks


def local_sizes(job: TrainJob, report: Callable[[str], object]) -> LocalSizes:
    """Return what chooses the ranks of each attempt on this machine. report: prints a line. Raises
    UserError if the job fits in memory at none of its sizes."""
    from forescale.plan.oom import fits_here  # most starts need no plan

    def can(ranks: int) -> bool:
        return not job.problems(world_size=ranks) and bool(fits_here(job, ranks))

    if job.elastic is None:
        ranks = job.launch.processes
        n = ranks.most if ranks else launcher.default_processes(can)
        return LocalSizes([n], is_fixed=True)
    usable = job.usable_sizes()
    fitting = [n for n in usable if fits_here(job, n) is not False]
    where = f"{job.elastic.key}={job.elastic.sizes}"
    if not fitting:
        todo = "see forescale plan, or write one number to try it nevertheless"
        raise UserError(where, "no number of ranks of it fits in the memory of this machine", todo)
    if fitting != usable:
        report(f"Note: {where}: what fits in memory is {in_words(fitting)}.")
    return LocalSizes(fitting)


def _introduce(started: Start, size: LocalSize) -> None:
    job, sources = started.job, started.sources
    ranks = f"{size.ranks} rank{'s' if size.ranks > 1 else ''}"
    ranks += f" ({size.limit})" if size.limit else ""
    grows = f" ({job.batch_ramp})" if job.batch_ramp.lengths else ""
    print(
        f"Run {started.run.path}: {job.total_steps:,} steps of {job.tokens_per_step:,} "
        f"{job.objective.unit}{grows}, ZeRO stage {job.engine.stage}, {job.precision.label}, "
        f"{ranks}.\n"
        f"Data {sources.where} (corpus hash {sources.corpus_hash[:16]}).",
        flush=True,
    )
    feed = feed_of(job, sources)
    if sources.is_mixture:
        for name, times in epochs(job, feed).items():
            print(f"  {name}: {times:.2f} epochs of {sources.datasets[name].where}")
    for note in notes(job, feed):
        print(f"Note: {note}", flush=True)
