"""`forescale train`: starts the ranks and restarts them; or, started as a rank, is one.

Invariant: the same command again goes on where the run was, whatever ended it.
"""

import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

from forescale.config.compose import compose, overrides_of
from forescale.config.frozen import thaw
from forescale.config.schema import ConfigError, Problem
from forescale.config.train import TrainJob
from forescale.errors import CRASHED, DONE, GAVE_UP, INTERRUPTED, UserError, storage_error
from forescale.resilience import launcher
from forescale.resilience.outcome import launch_of, leave_word
from forescale.run.directory import Attempt, Run
from forescale.run.feed import epochs, feed_of, notes
from forescale.run.start import Start, start

FROZEN = "--frozen"


JOB = TrainJob
EXAMPLES = (
    "train",
    "train experiment=quick",
    "train optimizer=adamw optimizer.learning_rate=1e-3 run.name=slower",
    "train data=dataset data.path=/data/books model=llama-160m train.tokens=3e9",
    "train model._target_=mypackage.Model model.width=256 run.name=mine",
)


def main(words: list[str]) -> int:
    """Returns 0 when the run is complete, 75 when it was interrupted, 76 when it keeps crashing."""
    began = time.monotonic()
    job = _frozen(words) if FROZEN in words else compose(TrainJob, overrides_of(TrainJob, words))
    if launcher.joined():
        return _rank(job, began)
    processes = job.launch.processes or launcher.default_processes()
    if problems := job.problems(world_size=processes):
        raise ConfigError(Problem(*p) for p in problems)
    for note in job.notes():
        print(f"Note: {note}")
    started = start(job)
    _introduce(started, processes)
    code = _keep_going(started, words, processes)
    if code == DONE:
        from forescale.inference.summary import summarize

        summarize(started)
    return code


def _frozen(words: list[str]) -> TrainJob:
    """The job as a run's directory has it: RUN --frozen, and trust=true where it names a class of
    the user's own. What a job in a queue goes by, for months."""
    names = [word for word in words if word not in (FROZEN, "trust=true")]
    if len(names) != 1 or "=" in names[0]:
        todo = f"write forescale train RUN {FROZEN}, and nothing else"
        raise UserError(" ".join(words), "is not one run", todo)
    run = Run.existing(names[0])
    job = thaw(TrainJob, run.config, trust="trust=true" in words)
    where = run.path.resolve()  # the directory may have been moved since
    return replace(job, run=replace(job.run, name=where.name, root=str(where.parent)))


def _rank(job: TrainJob, began: float) -> int:
    from forescale.engine.world import lost_peer, set_environment

    set_environment()
    from forescale.plan.oom import explained
    from forescale.train.trainer import run_rank

    try:
        with explained(job):
            code = run_rank(job, began)
    except BaseException as e:
        code = _last_words(e, isinstance(e, Exception) and lost_peer(e))
    # Worker threads of the libraries may hold up a normal exit, and peers wait in a collective for
    # a rank that is slow to die; everything is on disk.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _last_words(error: BaseException, has_lost_peer: bool) -> int:
    """Say what this rank dies of, to whoever reads its log and to its launcher; its exit code."""
    rank = os.environ["RANK"]
    if has_lost_peer:
        # Where that rank stood says why; where this one waited for it would only hide that.
        what = f"rank {rank} has lost another rank ({str(error).splitlines()[0]})"
        print(f"forescale: {what}; see what that one said last.", file=sys.stderr)
        return CRASHED
    fault = storage_error(error) if isinstance(error, OSError) else None
    error = fault or error
    if launcher.ATTEMPT in os.environ:
        leave_word(Path(os.environ[launcher.ATTEMPT]), int(rank), error)
    if isinstance(error, UserError):
        print(f"forescale: {error}", file=sys.stderr)
        return error.code
    traceback.print_exception(error)
    return CRASHED


def _introduce(started: Start, processes: int) -> None:
    job, sources = started.job, started.sources
    ranks = f"{processes} rank{'s' if processes > 1 else ''}"
    print(
        f"Run {started.run.path}: {job.total_steps:,} steps of {job.tokens_per_step:,} tokens, "
        f"ZeRO stage {job.engine.stage}, {job.precision.kind}, {ranks}.\n"
        f"Data {sources.where} (corpus hash {sources.corpus_hash[:16]}).",
        flush=True,
    )
    feed = feed_of(job, sources)
    if sources.is_mixture:
        for name, times in epochs(job, feed).items():
            print(f"  {name}: {times:.2f} epochs of {sources.datasets[name].where}")
    for note in notes(job, feed):
        print(f"Note: {note}", flush=True)


def _keep_going(started: Start, words: list[str], processes: int) -> int:
    """Attempt after attempt until the run is done, interrupted, or crashes without progress."""
    command = [sys.executable, "-P", "-m", "forescale", "train", *words]
    grace = started.job.launch.grace.seconds or 0.0
    crashes = 0
    while True:
        before = set(started.run.checkpoint_steps())
        attempt = started.run.new_attempt()
        code = launcher.start_ranks(command, processes, attempt.path, print, grace)
        progress = set(started.run.checkpoint_steps()) - before
        crashes = 1 if progress else crashes + 1
        action = launcher.after(code, crashes)
        if action == "end":
            if code == INTERRUPTED:
                print("Interrupted. The same command goes on where the run was.")
            return code
        if action == "give up":
            print(
                f"Gave up after {crashes} crashes without a new checkpoint. Likely cause: "
                f"{launch_of(attempt.path)['how']}. Attempts: {attempt.path.parent}",
                file=sys.stderr,
            )
            return GAVE_UP
        if newer := [a for a in started.run.attempts() if a.number > attempt.number]:
            _leave_to_others(newer)
        time.sleep(2.0**crashes / 2)
        print(f"Restarting (crash {crashes} of {launcher.MOST_CRASHES} without a new checkpoint).")


def _leave_to_others(newer: list[Attempt]) -> None:
    """A launcher that slept while another went on must not start against it. An attempt that began
    with a rollback is of its own ranks, and has no launcher."""
    for attempt in newer:
        if launch_of(attempt.path):
            what = f"attempt {attempt.number} was started elsewhere meanwhile"
            raise UserError(str(attempt.path), what, "nothing: the newer attempt goes on")
