"""Trains the runs of a trial, pair after pair, until its verdict stands.

Invariant: a run starts only if it is within what the campaign may spend, and is in the log once it
has ended, however it ended. A verdict stops the trial: runs of later pairs don't start, and those
that run are stopped. The same command goes on.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from forescale.config.target import CELL
from forescale.ground.console import span
from forescale.ground.errors import DONE, GAVE_UP, INTERRUPTED, USER, UserError
from forescale.resilience.pool import EndedTraining, Pool
from forescale.run.directory import Run
from forescale.run.rows import read_rows
from forescale.trials.campaign import Planned
from forescale.trials.config import TryJob
from forescale.trials.queued import QueuePool
from forescale.trials.trial import Trial

_POLL = 0.2  # seconds between looks at processes
_LOOK = 5.0  # seconds between looks at the time that runs under way have spent
_CRASHES = 3  # of one run, after which the trial stops


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the campaign's lock, which the kernel frees if the process dies. Raises UserError if
    another process holds it."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        todo = "wait for it, or choose another campaign=NAME"
        raise UserError(str(folder), "is in use by another process", todo) from None
    try:
        yield
    finally:
        lock.release()


class Runner:
    """Runs one trial. log: gets a line for each pair and each verdict; most: pairs, by default
    those of the job, or of the trial if it has more."""

    def __init__(
        self, trial: Trial, job: TryJob, log: Callable[[str], None], most: int | None = None
    ):
        self.trial, self.job, self.log = trial, job, log
        self.campaign = trial.campaign
        folder, options = self.campaign.folder, [f"slurm={job.slurm}", *job.submit]
        self.pool: Pool | QueuePool = (
            Pool(folder / "logs", job.at_once, log, key="at_once", noun="run")
            if job.slurm is None
            else QueuePool(folder, job.at_once, options, log)
        )
        self._crashes, self._next_look = Counter[str](), 0.0
        self._started: dict[str, float] = {}  # when each run of this command began
        self._took: list[float] = []  # seconds of those that are complete
        self._planned: dict[str, Planned] = {}
        self.budget_is_spent = False
        self.most = max(job.pairs, trial.row["pairs"]) if most is None else most
        self.budget = self.campaign.budget(job.budget)

    def go(self) -> int:
        """Run until the trial is over, and return 0; 75 after a stop signal. Raises UserError for a
        change that `train` refuses, or that isn't fair."""
        with self.pool.stopping():
            try:
                self._go_on()
                while self.pool.running:
                    time.sleep(_POLL)
                    self._keep_to_seconds()
                    if ends := self.pool.ended():
                        for end in ends:
                            self._enter(end)
                        self._go_on()
            except UserError as e:
                self._stop_rest()
                self._enter_stop(str(e))
                raise
        return INTERRUPTED if self.pool.stop_signal is not None else DONE

    def _go_on(self) -> None:
        self.trial.settle(self.most, self.log)
        planned_now = self.trial.planned(self.most)
        self._planned |= {p.name: p for p in planned_now}
        needed = {p.name for p in planned_now}
        self.pool.stop([name for name in self.pool.running if name not in needed])
        for planned in planned_now:
            if not self.pool.has_room or self.budget_is_spent:
                return
            if planned.name in self.pool.running or self.trial.outcome(planned).state != "open":
                continue
            if not self._pays(planned):
                return
            self._started[planned.name] = time.monotonic()
            self.pool.start(planned.name, [*planned.words, CELL], folder=planned.folder)

    def _stop_rest(self) -> None:
        self.pool.stop(self.pool.running)
        while self.pool.running:
            time.sleep(_POLL)
            for end in self.pool.ended():
                self._enter(end, quietly=True)

    def _tell(self, name: str) -> None:
        """Say that a run is complete, and how long the stage takes if it needs all its pairs."""
        self._took.append(time.monotonic() - self._started.get(name, time.monotonic()))
        left = sum(self.trial.outcome(one).state == "open" for one in self.trial.planned(self.most))
        rest = span(left * sum(self._took) / len(self._took) / self.job.at_once)
        most = f"at most {left} more runs, {rest}" if left else "the last of this stage"
        self.log(f"{name} took {span(self._took[-1])}; {most}.")

    def _pays(self, planned: Planned) -> bool:
        """True if the campaign may still spend what a run costs; says so once if not."""
        budget = self.budget
        flops, seconds, count = self.campaign.spent()
        known = (self._planned.get(name) for name in self.pool.running)
        under_way = [one.flops for one in known if one is not None]
        limits = (
            ("flops", budget.flops, flops + sum(under_way) + planned.flops),
            ("seconds", budget.seconds, seconds),
            ("runs", budget.runs, count + len(under_way) + 1),
        )
        for name, limit, cost in limits:
            if limit is not None and cost > limit:
                self._end_of_budget(name, limit, f"the next run would make it {cost:.4g}")
                return False
        return True

    def _keep_to_seconds(self) -> None:
        """Stop the runs under way once the campaign has spent its seconds with them."""
        limit, now = self.budget.seconds, time.monotonic()
        if limit is None or self.budget_is_spent or now < self._next_look:
            return
        self._next_look = now + _LOOK
        spent = self.campaign.spent(but=self.pool.running)[1]
        spent += sum(_spent(self.campaign.run(name))[1] for name in self.pool.running)
        if spent > limit:
            self._end_of_budget("seconds", limit, f"with the runs under way it is {spent:.4g}")
            self.pool.stop(self.pool.running)

    def _end_of_budget(self, name: str, limit: float, why: str) -> None:
        self.budget_is_spent = True
        self._enter_stop(name)
        todo = f"to go on, write a larger budget.{name}="
        self.log(f"Stopping: budget.{name}={limit:.4g} is spent; {why}; {todo}.")

    def _enter_stop(self, why: str) -> None:
        """Enter in the log why the trial stopped, once for the same reason."""
        number, ledger = self.trial.row["number"], self.campaign.ledger
        if why not in [row["why"] for row in ledger.of("stopped", attempt=number)[-1:]]:
            ledger.add("stopped", attempt=number, why=why)

    def _enter(self, end: EndedTraining, quietly: bool = False) -> None:
        """Enter a run that ended in the log. Raises UserError if it can't be had."""
        run = self.campaign.run(end.name)
        flops, seconds = _spent(run)
        self.campaign.ledger.add(
            "ran", attempt=self.trial.row["number"], name=end.name, code=end.code, why=end.why,
            flops=flops, seconds=seconds,
        )  # fmt: skip
        planned = self._planned.get(end.name)  # None: of another trial, in the queue since then
        if quietly or end.code == INTERRUPTED or planned is None:
            return
        state = self.trial.outcome(planned).state
        if end.code == DONE and state == "open":  # it would start again for ever
            problem, todo = "ended without a held-out loss of its last step", "give the base one"
            raise UserError(end.name, problem, f"{todo}; see {self.pool.logs / end.name}.log")
        if end.code == DONE:
            self._tell(end.name)
            return
        halted = state == "diverged"
        self._crashes[end.name] += 1
        gave_up = end.code in (USER, GAVE_UP) or self._crashes[end.name] >= _CRASHES
        if gave_up and not halted:
            problem = end.why or f"it ended with code {end.code}"
            todo = f"see {self.pool.logs / end.name}.log; the attempt counts"
            raise UserError(end.name, problem.rstrip("."), todo)


def _spent(run: Run) -> tuple[float, float]:
    """Return the FLOPs and seconds of a run so far, in all its attempts."""
    rows = read_rows(run.metrics, kind="train") if run.config.is_file() else []
    flops = float(rows[-1].get("flops_causal") or 0.0) if rows else 0.0
    return flops, sum(sum((row.get("seconds") or {}).values()) for row in rows)
