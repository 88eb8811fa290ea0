"""Trainings that run side by side on this machine, each as its own `forescale train`.

Invariant: they never outlive the process that started them (on Linux, however it ends), and on a
machine with GPUs each has one for each of its ranks, which no other has meanwhile. A first stop
signal lets all of them save and end; a second one interrupts them.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forescale.ground.errors import DONE, INTERRUPTED, UserError
from forescale.ground.processes import die_with_parent
from forescale.resilience.elastic import gpus
from forescale.resilience.launcher import stop_signals_handled_by

_TAIL = 4096  # bytes of a log file in which the last message is looked for
_LONGEST = 500  # characters of it


@dataclass(frozen=True)
class EndedTraining:
    """A training that has ended. code: its exit code; why: its last message, if it failed."""

    name: str
    code: int
    why: str


class Pool:
    """The trainings of one process. logs: the folder of their output, NAME.log each; ranks: of
    each; at_once: most of them at a time; log: gets a line when they are to stop; noun: what lines
    call one. Raises UserError if they need more GPUs than there are."""

    def __init__(
        self, logs: Path, at_once: int, log: Callable[[str], None], *, ranks: int = 1,
        key: str = "launch.at_once", noun: str = "cell",
    ):  # fmt: skip
        self.logs, self.at_once, self.ranks, self.log, self.noun = logs, at_once, ranks, log, noun
        self.stop_signal: int | None = None
        self._processes: dict[str, subprocess.Popen] = {}
        here, self._used = gpus(), dict[str, str]()  # GPUs by name
        if here and at_once * ranks > len(here):
            problem = f"{at_once} at once, {ranks} ranks each, need {at_once * ranks} GPUs; here "
            todo = f"write {key}={len(here) // ranks}"
            todo = todo if ranks <= len(here) else "use a larger machine"
            raise UserError(key, f"{problem}are {len(here)}", todo)
        groups = [here[i : i + ranks] for i in range(0, len(here), ranks)]
        self._free = [",".join(group) for group in groups if len(group) == ranks]

    @property
    def running(self) -> list[str]:
        """The names of those that run."""
        return [*self._processes]

    @property
    def has_room(self) -> bool:
        """True if another one can start now."""
        return len(self._processes) < self.at_once and self.stop_signal is None

    def start(
        self, name: str, words: Sequence[str], *, alone: bool = False,
        variables: Mapping[str, str] | None = None, folder: Path | None = None,
    ) -> int:  # fmt: skip
        """Start `forescale train WORDS` and return the id of its process. alone: it has all cores;
        variables: of the environment, beside those of this process; folder: where it runs."""
        path = self.logs / f"{name}.log"
        path.parent.mkdir(exist_ok=True)
        if path.is_symlink():  # to what isn't ours
            raise UserError(str(path), "is a link, so no output is added to it", "remove it")
        at_once = 1 if alone else self.at_once
        threads = max(1, len(os.sched_getaffinity(0)) // at_once // self.ranks)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **(variables or {})}
        if self._free:
            self._used[name] = environment["CUDA_VISIBLE_DEVICES"] = self._free.pop(0)
        with open(path, "ab") as f:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-P", "-m", "forescale", "train", *words],
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        return self._processes[name].pid

    def ended(self) -> list[EndedTraining]:
        """Return those that have ended since the last call."""
        ends = []
        for name, process in list(self._processes.items()):
            if (code := process.poll()) is None:
                continue
            del self._processes[name]
            if name in self._used:
                self._free.insert(0, self._used.pop(name))
            ends.append(EndedTraining(name, code, self._why(name, code)))
        return ends

    def _why(self, name: str, code: int) -> str:
        path = self.logs / f"{name}.log"
        if code in (DONE, INTERRUPTED) or not path.exists():
            return ""
        text = path.read_bytes()[-_TAIL:].decode(errors="replace")
        _, mark, message = text.rpartition("forescale: ")  # an error message, or the last line
        return (message.strip() if mark else text.strip().rpartition("\n")[2])[:_LONGEST]

    def stop(self, names: Iterable[str]) -> None:
        """Let some of them save and end."""
        for name in names:
            self._processes[name].send_signal(signal.SIGTERM)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Within the block, pass stop signals on to those that run, and start none after one."""
        with stop_signals_handled_by(self._on_signal):
            yield

    def _on_signal(self, number: int, frame) -> None:
        again, self.stop_signal = self.stop_signal is not None, number
        if not again:
            count = len(self._processes)
            those = f"{count} {self.noun}s save a checkpoint and end"
            self.log(f"Stopping: {those if count else f'no {self.noun} runs, and none starts'}.")
        for process in self._processes.values():
            process.send_signal(signal.SIGINT if again else signal.SIGTERM)
