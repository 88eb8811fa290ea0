"""Heartbeats: what each rank reports about itself, in its node's memory and in the run directory.

    /dev/shm/forescale-UID-HASH/        one directory per node and launch (HASH: of its first
                                        attempt and the master's port)
      rank-3.json                       the rank's heartbeat, replaced as a whole
      rank-3.place                      its step and place at this moment, mapped into its memory
      rank-3.stacks                     its Python stacks, written when they are requested
      asked                             exists: all ranks write their stacks
      over                              exists: the node's report is written, all ranks exit
    attempts/0003/heartbeat/HOST.json   all heartbeats of a node, with the silence of each rank

Invariant: a rank writes only to the memory of its own node, and one rank per node writes to the run
directory. So 2,000 nodes write 2,000 small files every `share_interval`, and they are read only
when something is wrong.
"""

import json
import mmap
import os
import shutil
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from forescale.ground.errors import UserError
from forescale.ground.storage import make_private, memory_folder, read_typed
from forescale.ground.typed import AnyNumber, Count, Flag, Number, typed
from forescale.resilience.phases import PLACE

ENDED = "ended"
# Seconds until a directory counts as left behind: processes of another container can't be seen.
_OLD = 600.0


@dataclass(frozen=True)
class Heartbeat:
    """What one rank reports about itself.

    began, time: when its process began and when this was written, in seconds since the epoch; time
    goes on from `began` whatever is done to the clock.
    here: seconds that it has been at the place `at`; limit: seconds after which that is a hang.
    quiet: seconds without a heartbeat after which the rank counts as silent.
    starting: it has not finished its first step, which may take long.
    pace: seconds per step at each place, over the last `steps` steps. process: see `process_mark`.
    stage: of the pipeline; None without one.
    """

    rank: Count
    host: str
    pid: Count
    began: Number
    time: Number
    step: Count
    phase: str
    at: str
    here: Number
    limit: AnyNumber
    quiet: AnyNumber
    starting: Flag
    pace: dict[str, Number] = field(default_factory=dict)
    steps: Count = 0
    process: str | None = None
    stage: Count | None = None

    @property
    def has_ended(self) -> bool:
        """True if the rank has announced its exit: nobody waits for it any more."""
        return self.phase == ENDED


@dataclass(frozen=True)
class RankStatus:
    """The last heartbeat of a rank, and for how many seconds none has come since."""

    heartbeat: Heartbeat
    silence: float

    @property
    def is_silent(self) -> bool:
        """True if no heartbeat has come for longer than the rank's `quiet`."""
        return not self.heartbeat.has_ended and self.silence > self.heartbeat.quiet

    @property
    def is_stuck(self) -> bool:
        """True if the rank has been at its place for longer than its `limit`."""
        return not self.heartbeat.has_ended and self.heartbeat.here > self.heartbeat.limit


class _Row(TypedDict):
    """A heartbeat in the file of a node, with the seconds that none has come since."""

    pid: Count
    silence: NotRequired[Number]


class _Node(TypedDict):
    """The content of a node's file."""

    host: str
    time: Number
    ranks: list[_Row]


def node_path(attempt: Path, port: str) -> Path:
    """Return the directory of a launch in a node's memory.

    port: the master's. It is part of the name because a run that was deleted and started anew has
    the same attempt path again.
    """
    return memory_folder(f"{attempt.resolve()}:{port}")


class NodeDirectory:
    """The directory in which the ranks of a launch on this host exchange heartbeats.

    Raises UserError if it belongs to another user, OSError if it can't be made.
    """

    def __init__(self, attempt: Path):
        self.path = make_private(node_path(attempt, os.environ.get("MASTER_PORT", "")))

    def _file(self, rank: int) -> Path:
        return self.path / f"rank-{rank}.json"

    def stacks(self, rank: int) -> Path:
        """Return the file into which a rank writes its Python stacks when they are requested."""
        return self.path / f"rank-{rank}.stacks"

    def mirror(self, rank: int) -> mmap.mmap:
        """Return memory for the place of a rank, which other processes can read as it changes."""
        path = self.path / f"rank-{rank}.place"
        path.write_bytes(bytes(PLACE.size))
        with open(path, "r+b") as f:
            return mmap.mmap(f.fileno(), PLACE.size)

    def write(self, heartbeat: Heartbeat) -> None:
        """Write a heartbeat. If there is no room for it, at least touch the file."""
        path = self._file(heartbeat.rank)
        temporary = path.with_suffix(".new")
        try:
            temporary.write_text(json.dumps(asdict(heartbeat)))
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                os.utime(path)

    def read(self) -> dict[int, tuple[Heartbeat, int]]:
        """Return, by rank, the last heartbeat and a number that changes with every new one.

        If the rank has moved on since, or was stopped after that, the heartbeat has the new place.
        """
        heartbeats = {}
        for path in self.path.glob("rank-*.json"):
            with suppress(OSError, UserError):  # it has just been removed
                changed = path.stat().st_mtime_ns
                heartbeat = read_typed(Heartbeat, path)
                with suppress(OSError, struct.error, UnicodeDecodeError):
                    step, text = PLACE.unpack(path.with_suffix(".place").read_bytes())
                    at = text.rstrip(b"\0").decode()
                    if at and (step, at) != (heartbeat.step, heartbeat.at):
                        heartbeat = replace(heartbeat, step=step, at=at, here=0.0)
                heartbeats[heartbeat.rank] = (heartbeat, changed)
        return dict(sorted(heartbeats.items()))

    def request_stacks(self) -> None:
        """Ask the ranks of the node to write their Python stacks."""
        with suppress(OSError):
            (self.path / "asked").touch()

    def stacks_are_requested(self) -> bool:
        return (self.path / "asked").exists()

    def request_exit(self) -> None:
        """Ask all ranks of the node to exit at once."""
        with suppress(OSError):
            (self.path / "over").touch()

    def exit_is_requested(self) -> bool:
        return (self.path / "over").exists()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def remove_stale(current: NodeDirectory) -> None:
    """Delete this user's directories of earlier launches whose processes are all gone. current: of
    this launch; it tells the time, because the clock may just have been set."""
    now = current.path.stat().st_mtime
    for path in current.path.parent.glob(f"forescale-{os.getuid()}-*"):
        with suppress(OSError, UserError):
            pids = [read_typed(_Row, p)["pid"] for p in path.glob("rank-*.json")]
            old = now - path.stat().st_mtime > _OLD
            if old and not any(Path(f"/proc/{pid}").exists() for pid in pids):
                shutil.rmtree(path, ignore_errors=True)


def write_node(attempt: Path, host: str, ranks: Iterable[RankStatus]) -> None:
    """Write a node's heartbeats to the run directory, atomically. They are not fsynced: the next
    ones replace them soon."""
    path = attempt / "heartbeat" / f"{host}.json"
    rows = [{**asdict(s.heartbeat), "silence": round(s.silence, 3)} for s in ranks]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(exist_ok=True)
    temporary.write_text(json.dumps({"host": host, "time": time.time(), "ranks": rows}))
    os.replace(temporary, path)


def read_nodes(attempt: Path, without: str = "", every: float = 0.0) -> list[RankStatus]:
    """Return the ranks of all nodes of an attempt, sorted by rank, leaving out the host `without`.

    every: seconds between two writes of a node. What a file's age exceeds twice that is added to
    the silence of its ranks, by the clocks of the two nodes, which the preflight compares. One that
    is set later can make us blame the wrong node for a hang, but makes none: a rank here is stuck.
    """
    statuses, now = [], time.time()
    for path in (attempt / "heartbeat").glob("*.json"):
        with suppress(OSError, UserError):
            node = read_typed(_Node, path)
            late = max(0.0, now - node["time"] - 2 * every)
            for row in node["ranks"] if node["host"] != without else ():
                heartbeat = typed(Heartbeat, row, str(path))
                statuses.append(RankStatus(heartbeat, row.get("silence", 0.0) + late))
    return sorted(statuses, key=lambda s: s.heartbeat.rank)
