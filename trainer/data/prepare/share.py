"""Processes that build one dataset together, on one machine or on nodes of a cluster. Each does the
tasks that nobody does yet, and may come and go at any time: whoever is left does the rest.

    builders/n1-4021-1a2b     of each process: who it is, its phase, its pace (JSON, each 5 s)
    claims/tokenise/000012    a link, whose text names the process that does this task of a phase
    claims/tokenise/000012.done    the same, once its result is there; with + if that is new

Invariant: a result depends on the task alone and gets its name by a rename. So no result depends on
claims, nor on who is thought to live: a task that two do is only time lost. A result counts if
who made it lives or ended in order; else the next one to claim it verifies it, or makes it again.
"""

import json
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from forescale.data.prepare.pool import Task, Tick
from forescale.ground.console import Meter, Progress, Rates, log_line
from forescale.ground.errors import UserError

BUILDERS, CLAIMS = "builders", "claims"
PATIENCE = 90.0  # seconds without a sign after which a process on another machine counts as dead
_SIGN = 5.0  # seconds between signs of life
_RECORD = 4096  # bytes, all of them written at first: later a full disk doesn't hinder
_SOONEST, _LATEST = 0.05, 5.0  # seconds between looks while there is nothing to do
_LOOK = 10.0  # seconds between looks at what others have done
_REPORT = 60.0  # seconds between lines that say for whom this process waits
_DONE, _NEW = ".done", "+"
Do = Callable[[Iterator[Task], Tick, Callable[[Task], None]], None]


def work_path(output: Path) -> Path:
    """Return the path of the work directory for an output."""
    return output.with_name(f".{output.name}.building")


@dataclass(frozen=True)
class Builder:
    """What a process says of itself: host, pid, birth, place, job, restart, rank, began; its phase,
    which turn that is, its unit, the total and what all have done of it, and [done, all] tasks;
    new results that it has made, its own rate, whether it waits; how it ended. last_sign: when that
    was written, by the clock of the file system."""

    id: str
    facts: Mapping[str, Any]
    last_sign: float

    def state(self, now: float) -> Literal["lives", "ended", "dead"]:
        """Return whether it lives, by what is certain here, else by its last sign of life."""
        if self.facts.get("ended"):
            return "ended"
        if self.facts.get("place") == _place():
            lives = _birth(self.facts["pid"]) == self.facts["birth"]
            return "lives" if lives else "dead"
        this = _job()
        is_of_this_job = this["job"] and this["job"] == self.facts.get("job")
        if is_of_this_job and this["restart"] > self.facts.get("restart", 0):
            return "dead"  # SLURM has ended that start
        return "lives" if now - self.last_sign < PATIENCE else "dead"

    @property
    def label(self) -> str:
        return f"{self.facts.get('host', self.id)} (process {self.facts.get('pid', '?')})"


def read_builders(work: Path) -> list[Builder]:
    """Return the processes that have had a part in a build since it was last begun, by name."""
    paths = sorted((work / BUILDERS).glob("[!.]*"))
    return [builder for path in paths if (builder := _read(path))]


def _read(path: Path) -> Builder | None:
    with suppress(OSError), open(path, "rb") as file:  # opened: else NFS answers what it remembers
        last_sign = os.fstat(file.fileno()).st_mtime
        facts: Any = None
        with suppress(ValueError):
            facts = json.loads(file.read(_RECORD))
        return Builder(path.name, facts if isinstance(facts, dict) else {}, last_sign)
    return None


@cache
def _place() -> str:
    """Return what processes have in common that see each other's ids; "" if it isn't known."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _birth(pid: int) -> str | None:
    """Return when a process began, as the kernel counts; None if it isn't there or has ended."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None


def _job(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the job of SLURM that this process is of, its number of starts, and its task."""
    array, task = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    job = f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")
    restart, rank = (environment.get(f"SLURM_{x}", "0") for x in ("RESTART_COUNT", "PROCID"))
    return {"job": job, "restart": int(restart), "rank": int(rank)}


class Crew:
    """This process among those that build together. Signs on where it is made, which one process
    at a time may do."""

    def __init__(self, work: Path, progress: Progress):
        self._work, self._progress = work, progress
        host = socket.gethostname().partition(".")[0]
        self.id = f"{host}-{os.getpid()}-{secrets.token_hex(2)}"
        self.num_new = self.num_own = 0  # results that were not there before: of all, of this one
        self._facts: dict[str, Any] = {
            **{"host": host, "pid": os.getpid(), "birth": _birth(os.getpid()), "place": _place()},
            **{**_job(), "began": time.time(), "phase": "", "turn": 0, "ended": ""},
        }
        self._rates, self._own = Rates(time.monotonic()), 0
        self._known: dict[str, tuple[float, str]] = {}  # states of others: when looked up, which
        self._path = work / BUILDERS / self.id
        self._path.parent.mkdir(exist_ok=True)
        # Who is killed before its first sign has no name: without facts it would seem to live.
        new = self._path.with_name(f".{self.id}")
        self._fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._lock, self._over = threading.Lock(), threading.Event()
        self._sign()
        os.rename(new, self._path)
        self._signs = threading.Thread(target=self._give_signs, daemon=True)
        self._signs.start()

    def leave(self, how: str) -> None:
        """Say how this process ended; it gives no more signs of life."""
        self._over.set()
        self._signs.join()
        with self._lock:
            self._facts["ended"] = " ".join(how.split())[:500] or "ended"
        with suppress(OSError):
            self._sign()
        os.close(self._fd)

    def others(self) -> list[Builder]:
        """Return the other processes that live."""
        with suppress(FileNotFoundError):
            now = self._path.stat().st_mtime
            every = read_builders(self._work)
            return [b for b in every if b.id != self.id and b.state(now) == "lives"]
        return []

    def run(self, name: str, unit: str, total: int | None, tasks: Sequence[Task], do: Do) -> None:
        """Do tasks until all of them are done, by whomever. Raises UserError or OSError if the
        directory is gone, as it is once another process has finished the dataset."""
        with self._lock:
            self._rates, self._own = Rates(time.monotonic()), 0
        phase = _Phase(self, name, unit, total, tasks)
        with suppress(OSError):
            self._sign()
        pause, waited, reported = _SOONEST, 0.0, 0.0
        while phase.left:
            before = len(phase.left)
            do(phase.mine(), phase.tick, phase.is_done)
            phase.look()
            if len(phase.left) < before:
                pause = _SOONEST
            elif phase.left:
                self._note(waits=True)
                if waited >= reported + _LOOK:
                    reported = waited + _REPORT - _LOOK
                    self._say(phase)
                time.sleep(pause)
                waited, pause = waited + pause, min(1.3 * pause, _LATEST)
        phase.meter.end()

    def _say(self, phase: "_Phase") -> None:
        names = sorted({self._label(owner) for owner in phase.owners()})
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        tasks = "a task" if len(phase.left) == 1 else f"{len(phase.left)} tasks"
        log_line(self._progress, f"{phase.name}: waits for {tasks} of {some or 'others'}")

    def _label(self, id: str) -> str:
        builder = _read(self._work / BUILDERS / id)
        return builder.label if builder else id

    def expect_known(self) -> None:
        """Raise UserError if another process has finished the build, or begun it anew."""
        if not self._path.exists():
            problem = "is gone: another process has finished the build, or begun it anew"
            raise UserError(str(self._work), problem, "run the same command again")

    def state(self, id: str) -> str:
        """Return the state of a process, as it was some seconds ago at most."""
        if id == self.id:
            return "lives"
        at, state = self._known.get(id, (0.0, "lives"))
        if state == "lives" and time.monotonic() - at > _SIGN:
            builder = _read(self._work / BUILDERS / id)
            state = builder.state(os.fstat(self._fd).st_mtime) if builder else "dead"
            self._known[id] = time.monotonic(), state
        return state

    def _note(self, amount: int = 0, **facts: Any) -> None:
        with self._lock:
            self._own += amount
            self._facts.update(facts, new=self.num_own)

    def _sign(self) -> None:
        with self._lock:
            self._rates.see(time.monotonic(), self._own, 0)
            self._facts["rate"] = self._rates.per_second
            text = json.dumps(self._facts).encode()[: _RECORD - 1].ljust(_RECORD - 1) + b"\n"
        os.pwrite(self._fd, text, 0)  # in its place: no link of it changes

    def _give_signs(self) -> None:
        while not self._over.wait(_SIGN):
            with suppress(OSError):
                self._sign()


class _Phase:
    """The tasks of a phase that are left. They are done from the heaviest on, roughly: processes
    shuffle them in blocks, each in its own way, so that few reach for the same one."""

    def __init__(self, crew: Crew, name: str, unit: str, total: int | None, tasks: Sequence[Task]):
        self.name, self._crew, self._count = name, crew, len(tasks)
        self.meter = Meter(crew._progress, name, total, unit)
        self._folder = crew._work / CLAIMS / name.replace(" ", "-")
        self._folder.mkdir(parents=True, exist_ok=True)
        ordered = sorted(tasks, key=lambda task: -task.weight)
        blocks = [ordered[i : i + 64] for i in range(0, len(ordered), 64)]
        chance = random.Random(crew.id)
        if crew.others():
            blocks = [chance.sample(block, len(block)) for block in blocks]
        self.left = {task.result.name: task for block in blocks for task in block}
        self._new: set[str] = set()  # of those in hand, what was not there before
        self._looked = time.monotonic()
        crew._note(phase=name, unit=unit, total=total, done=0, tasks=[0, len(tasks)])
        crew._note(turn=crew._facts["turn"] + 1, waits=False)

    def mine(self) -> Iterator[Task]:
        """Claim one task after another, of those that are free now, and yield it."""
        names = self.look()
        for name, task in [*self.left.items()]:
            if name in self.left and self._claim(name, name in names):
                if not task.result.exists():
                    self._new.add(name)
                yield task

    def tick(self, amount: int, tokens: int) -> None:
        self.meter(amount, tokens)
        self._crew._note(amount, done=self.meter.done, waits=False)
        if time.monotonic() - self._looked > _LOOK:
            self.look()

    def is_done(self, task: Task) -> None:
        name = task.result.name
        is_new = name in self._new
        self._crew.num_new += is_new
        self._crew.num_own += is_new
        self._link(f"{name}{_DONE}", _NEW * is_new)
        self.left.pop(name, None)
        self._note()

    def look(self) -> set[str]:
        """Count what others have done since; return the names of all claims."""
        self._crew.expect_known()
        self._looked, names = time.monotonic(), {*os.listdir(self._folder)}
        for name in [name for name in self.left if f"{name}{_DONE}" in names]:
            owner = self._owner(f"{name}{_DONE}")
            if self._crew.state(owner.removesuffix(_NEW)) != "dead":
                self.meter(self.left.pop(name).weight, 0)
                self._crew.num_new += owner.endswith(_NEW)
        self._note()
        return names

    def owners(self) -> set[str]:
        """Return who does what is left."""
        return {owner for name in self.left if (owner := self._owner(name))}

    def _note(self) -> None:
        tasks = [self._count - len(self.left), self._count]
        self._crew._note(done=self.meter.done, tasks=tasks)

    def _owner(self, name: str) -> str:
        with suppress(FileNotFoundError):
            return os.readlink(self._folder / name)
        return ""

    def _claim(self, name: str, is_claimed: bool) -> bool:
        """Claim a task that is free, or whose process has ended without its result."""
        if not is_claimed:
            with suppress(FileExistsError):
                os.symlink(self._crew.id, self._folder / name)
                return True
        owner = self._owner(name)
        if owner != self._crew.id and self._crew.state(owner) == "lives":
            return False  # (Its own is one that NFS made, and then said that it was there.)
        self._link(name)
        return True

    def _link(self, name: str, mark: str = "") -> None:
        new = self._folder / f".{self._crew.id}"
        os.symlink(f"{self._crew.id}{mark}", new)
        os.replace(new, self._folder / name)
