"""A small training job on the lab's cluster, and what a test wants to know of it."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from forescale.resilience.outcome import launch_of
from forescale.run.directory import Attempt, Run
from forescale.run.rows import read_rows
from tests.cluster.lab import Lab

# The rarer faults, and more runs, are tested too.
ALL = os.environ.get("FORESCALE_CLUSTER") == "all"

# A constant learning rate, so that a short run is the beginning of a long one; steps of some 60 ms.
KEYS = {
    "machine": "cpu",
    "slurm": "lab",
    "optimizer": "adamw",
    "schedule": "constant",
    "schedule.warmup": "0 steps",
    "engine": "zero1",
    "train.steps": "150",
    "train.sequence_length": "128",
    "train.global_batch": "8",
    "train.micro_batch": "2",
    "train.compile": "off",
    "model.width": "64",
    "model.num_layers": "2",
    "validation.every": "100000 steps",
    "checkpoint.every": "20 steps",
    "launch.grace": "15 s",
    "heartbeat.patience": "4 s",
    "slurm.time": "20 min",
    "slurm.allreduce": "false",  # it imports torch on each node, before each attempt
}


@dataclass
class Job:
    """One submitted run. `keys` are laid over KEYS."""

    lab: Lab
    root: Path
    name: str
    dataset: Path
    keys: dict[str, str] = field(default_factory=dict)
    id: str = ""
    zone: str = ""  # time zone of whoever types the commands; by default this machine's

    @property
    def run(self) -> Run:
        return Run(self.root / self.name)

    def forescale(self, *words: str, check: bool = True) -> str:
        environment = {"OMP_NUM_THREADS": "1", "COLUMNS": "150"}
        environment |= {"TZ": self.zone} if self.zone else {}
        command = [sys.executable, "-P", "-m", "forescale", *words]
        return self.lab.run(*command, check=check, cwd=self.root.parent, env=environment)

    def submit(self, **variables: str) -> "Job":
        self.ask_to_submit(**variables)
        newest = self.run.jobs()[-1] / "job.json"
        self.id = json.loads(newest.read_text())["id"]
        return self

    def ask_to_submit(self, **variables: str) -> str:
        """Return what the command prints."""
        keys = {**KEYS, "run.root": str(self.root), "data": "dataset", "data.path": self.dataset}
        keys |= {"slurm.scratch": str(self.lab.scratch), **self.keys, **variables}
        words = (f"{k}={v}" for k, v in keys.items())
        return self.forescale("submit", "train", self.name, *words)

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in read_rows(self.run.metrics, kind="train")}

    @property
    def step(self) -> int:
        return max(self.losses(), default=0)

    def attempts(self) -> list[Attempt]:
        return self.run.attempts()

    @property
    def trained_in_newest(self) -> int:
        """Steps that the newest attempt has made."""
        parent = self.attempts()[-1].parent if self.attempts() else None
        return self.step - parent.step if parent else 0

    def lives(self) -> list[dict]:
        return [launch for a in self.attempts() if (launch := launch_of(a.path))]

    def until(self, holds: Callable[[], object], seconds: float = 150) -> None:
        """Wait, at most so long on a busy machine. Each look starts a process of SLURM or reads all
        rows, which takes cores from the ranks: so there are few."""
        try:
            self.lab.wait(holds, seconds, every=0.3)
        except AssertionError as e:
            for node in self.lab.nodes:  # where do they stand?
                for pid in self.lab.pids(node, "-m forescale.slurm."):
                    os.kill(pid, signal.SIGUSR2)
            time.sleep(1)
            raise AssertionError(f"{e}\n{self.logs()}") from None

    def until_step(self, step: int) -> "Job":
        self.until(lambda: self.step >= step)
        return self

    def until_over(self, seconds: float = 300) -> str:
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.until(lambda: self.lab.state(self.id) in over, seconds)
        return self.lab.state(self.id)

    def logs(self) -> str:
        """The batch script's log, and the last words of all ranks."""
        logs = [*self.run.path.glob("jobs/*/slurm*.log"), *self.run.path.glob("attempts/*/*.log")]
        tails = (f"--- {p}\n{p.read_text(errors='replace')[-1500:]}" for p in sorted(logs))
        return "\n".join(tails)

    @property
    def log(self) -> str:
        paths = sorted(self.run.path.glob("jobs/*/slurm*.log"))
        return "\n".join(p.read_text(errors="replace") for p in paths)


@dataclass
class Fault:
    """A moment, and how long it takes a job to notice, and to train again."""

    job: Job
    name: str
    began: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.attempt = self.job.attempts()[-1]
        self.step = self.job.step

    def again(self, seconds: float = 200) -> "Fault":
        """Wait until a later attempt has made a step."""
        number = self.attempt.number

        def trains() -> bool:
            newest = self.job.attempts()[-1]
            parent = newest.parent
            if newest.number == number or parent is None:
                return False
            return self.job.step > parent.step or self.job.lab.state(self.job.id) == "COMPLETED"

        self.job.until(trains, seconds)
        self.trains = time.time()
        return self

    @property
    def signalled(self) -> float:
        """When the batch script was asked to end, to the second."""
        (line,) = [x for x in self.job.log.splitlines() if "SIGUSR1: ranks" in x][-1:]
        now = time.localtime()
        clock = time.strptime(line.split()[0], "%H:%M:%S")
        return time.mktime((*now[:3], clock.tm_hour, clock.tm_min, clock.tm_sec, *now[6:]))

    @property
    def noticed(self) -> float | None:
        """Seconds until the launcher saw the end of the ranks, or was told to end them; None where
        it was killed together with them."""
        launch = launch_of(self.attempt.path)
        moments = [launch["ended"]] if "ended" in launch else []
        hang = self.attempt.path / "hang.json"
        moments += [hang.stat().st_mtime] if hang.exists() else []
        return min(moments) - self.began if moments else None

    @property
    def lost(self) -> int:
        """Steps made and not kept."""
        rows = read_rows(self.attempt.metrics.path, kind="train")
        last = max((r["step"] for r in rows), default=0)
        later = [a.parent for a in self.job.attempts() if a.number > self.attempt.number]
        step = min((parent.step for parent in later if parent), default=last)
        return max(0, last - step)

    def row(self) -> str:
        """As a line of a Markdown table."""
        if self.trains == self.began:
            return f"| {self.name} | - | training goes on | 0 |"
        noticed = "-" if self.noticed is None else f"{self.noticed:.1f} s"
        return f"| {self.name} | {noticed} | {self.trains - self.began:.0f} s | {self.lost} |"


REPORTS: list[str] = []  # a line a fault, for the end of the session


def tell(fault: Fault) -> None:
    REPORTS.append(fault.row())
    if path := os.environ.get("FORESCALE_FAULTS"):
        with open(path, "a") as f:
            f.write(fault.row() + "\n")
