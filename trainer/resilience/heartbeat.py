"""What a rank says of itself now and then, and where: on its node, and one file a node for the run.

    /dev/shm/forescale-UID-HASH/        one directory a node and launch (HASH: of its first attempt)
      rank-3.json                       a rank's beat, replaced as a whole
      rank-3.place                      its step and place at this moment, mapped into its memory
      rank-3.stacks                     where faulthandler writes when the rank is asked (SIGUSR2)
      over                              the node's report is written: all leave
    attempts/0003/pulse/HOST.json       all beats of a node, with how long each has been silent

Invariant: a rank writes only memory of its own node, however many ranks there are; one rank a node
writes to the run. So 2,000 nodes write 2,000 small files every `pulse.share`, and nobody reads them
but who has a reason to.
"""

import hashlib
import json
import mmap
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from forescale.errors import UserError
from forescale.resilience.phases import PLACE

ENDED = "ended"
_OLD = 600.0  # seconds; a process that another container runs can't be seen from this one


@dataclass(frozen=True)
class Beat:
    """Of one rank. began, time: seconds since the epoch at which its process began and this was
    said; here: seconds that it has been at `at`; limit: how many are too many; quiet: for how long
    it may say nothing; pace: seconds a step at each place, over its last `steps` steps."""

    rank: int
    host: str
    pid: int
    began: float
    time: float
    step: int
    phase: str
    at: str
    here: float
    limit: float
    quiet: float
    starting: bool
    pace: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    @property
    def has_ended(self) -> bool:
        """It said that it leaves: nobody may wait for it any more."""
        return self.phase == ENDED


@dataclass(frozen=True)
class Seen:
    """A beat, and how many seconds ago, for the reader's patience, it was heard."""

    beat: Beat
    silence: float

    @property
    def is_silent(self) -> bool:
        return not self.beat.has_ended and self.silence > self.beat.quiet

    @property
    def is_stuck(self) -> bool:
        """Longer at its place than ever before, by far."""
        return not self.beat.has_ended and self.beat.here > self.beat.limit


_FIELDS = {f.name for f in fields(Beat)}


def _beat(stored: dict[str, Any]) -> Beat:
    return Beat(**{k: v for k, v in stored.items() if k in _FIELDS})


def node_path(attempt: Path, port: str) -> Path:
    """A launch's directory on each of its nodes. port: of its master; a run that was deleted and
    begun anew has the same attempt once more."""
    name = hashlib.sha256(f"{attempt.resolve()}:{port}".encode()).hexdigest()[:16]
    return _memory() / f"forescale-{os.getuid()}-{name}"


class Node:
    """The directory in which the ranks of a launch on this host meet. Raises UserError where it
    can't be made, or belongs to somebody else."""

    def __init__(self, attempt: Path):
        self.path = node_path(attempt, os.environ.get("MASTER_PORT", ""))
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        if self.path.is_symlink() or self.path.stat().st_uid != os.getuid():
            raise UserError(str(self.path), "belongs to somebody else", "remove it")

    def _file(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.json"

    def stacks(self, rank: int) -> Path:
        """Where a rank's Python stacks come when it is asked for them."""
        return self.path / f"rank-{rank}.stacks"

    def mirror(self, rank: int) -> mmap.mmap:
        """Memory for the place of a rank, which others see as it changes."""
        path = self.path / f"rank-{rank}.place"
        path.write_bytes(bytes(PLACE.size))
        with open(path, "r+b") as f:
            return mmap.mmap(f.fileno(), PLACE.size)

    def write(self, beat: Beat) -> None:
        """Say it. Where there is no room for words, at least show a sign of life."""
        path = self._file(beat.rank)
        temporary = path.with_suffix(".new")
        try:
            temporary.write_text(json.dumps(asdict(beat)))
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                os.utime(path)

    def read(self) -> dict[int, tuple[Beat, int]]:
        """By rank: its last beat, and a number that changes with every sign of life. Where the rank
        has moved on since, or was stopped in between, its beat stands at the new place."""
        found = {}
        for path in self.path.glob("rank-*.json"):
            with suppress(OSError, ValueError, TypeError):  # it has just been removed
                sign = path.stat().st_mtime_ns
                beat = _moved(_beat(json.loads(path.read_bytes())), path.with_suffix(".place"))
                found[beat.rank] = (beat, sign)
        return dict(sorted(found.items()))

    def ask(self) -> None:
        """Have the ranks of the node write down their stacks."""
        with suppress(OSError):
            (self.path / "asked").touch()

    def is_asked(self) -> bool:
        return (self.path / "asked").exists()

    def end(self) -> None:
        """Have all ranks of the node leave, hard."""
        with suppress(OSError):
            (self.path / "over").touch()

    def is_over(self) -> bool:
        return (self.path / "over").exists()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _moved(beat: Beat, mirror: Path) -> Beat:
    with suppress(OSError, struct.error, UnicodeDecodeError):
        step, text = PLACE.unpack(mirror.read_bytes())
        at = text.rstrip(b"\0").decode()
        if at and (step, at) != (beat.step, beat.at):
            return replace(beat, step=step, at=at, here=0.0)
    return beat


def sweep() -> None:
    """Remove what launches of this user left behind whose processes are all gone."""
    for path in _memory().glob(f"forescale-{os.getuid()}-*"):
        with suppress(OSError, ValueError, KeyError):
            pids = [json.loads(p.read_bytes())["pid"] for p in path.glob("rank-*.json")]
            old = time.time() - path.stat().st_mtime > _OLD
            if old and not any(Path(f"/proc/{pid}").exists() for pid in pids):
                shutil.rmtree(path, ignore_errors=True)


def _memory() -> Path:
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def share(attempt: Path, host: str, seen: Iterable[Seen]) -> None:
    """Put a node's beats where the whole run can read them. Atomic; not durable, for the next one
    comes soon."""
    path = attempt / "pulse" / f"{host}.json"
    rows = [{**asdict(s.beat), "silence": round(s.silence, 3)} for s in seen]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(exist_ok=True)
    temporary.write_text(json.dumps({"host": host, "time": time.time(), "ranks": rows}))
    os.replace(temporary, path)


def shared(attempt: Path, without: str = "", every: float = 0.0) -> list[Seen]:
    """The beats of all nodes of an attempt but `without`, by rank. every: how often they come; what
    is older than twice that adds to its ranks' silence, by the clocks of the two nodes."""
    found, now = [], time.time()
    for path in (attempt / "pulse").glob("*.json"):
        with suppress(OSError, ValueError, TypeError, KeyError):
            stored = json.loads(path.read_bytes())
            late = max(0.0, now - stored["time"] - 2 * every)
            if stored["host"] != without:
                found += [Seen(_beat(row), row["silence"] + late) for row in stored["ranks"]]
    return sorted(found, key=lambda s: s.beat.rank)
