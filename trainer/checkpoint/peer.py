"""Snapshots of the state in the memory of nodes, taken between two checkpoints.

    /dev/shm/forescale-UID-HASH/           of a run and a node (HASH: of both)
      rank-3.json                          the process of a rank that lives here
      step-00000120.attempt-0003/          the files that ranks of this node and of the node before
                                           it wrote of a checkpoint: each part is on two nodes

Invariant: a snapshot counts only if all files of its table are alive on some node and have the
table's sha256, if its attempt's rows are whole, and if no later attempt started before its step. It
is then published like any save, so that whatever reads a checkpoint, reads it. Taking one touches
no storage but the attempt's rows.
"""

import json
import os
import re
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
import torch

from forescale.checkpoint import writer
from forescale.checkpoint.choice import Report, open_readable
from forescale.checkpoint.reader import Checkpoint
from forescale.checkpoint.saver import Saver
from forescale.engine.portable.strips import rank_file
from forescale.engine.ranks import ALONE, Ranks, first, joined
from forescale.engine.world import World
from forescale.ground import storage
from forescale.ground.errors import UserError
from forescale.ground.storage import TABLE, FileEntry, HashingFile, read_table
from forescale.run.directory import Run
from forescale.run.history import Saved, history_of, step_before

_NAME = re.compile(r"step-(\d{8,18})\.attempt-(\d{4,9})")
_BLOCK = 1 << 26  # bytes that are sent at once
_HEADER = 4096  # bytes that say which files a rank sends


class PeerMemory:
    """The snapshots of a run on this node. Every rank makes one and calls its methods together.

    node: its name; nodes: of all ranks, on rank 0 alone. index, count: this rank among those of its
    node. trajectory: tells a run with other steps or batches from the one that took a
    snapshot: a run may be made longer only from a step that the storage has. source: of the
    checkpoint that was last published from here, on rank 0: "step", "nodes" (how many had parts of
    it), "stored" (the newest step that the storage had) and "what", which says so. neighbour: this
    rank sends its part to the one so many ranks after it; 0 without another node.
    """

    def __init__(self, run: Run, ranks: World, node: str | None = None, trajectory: str = ""):
        self.run, self._ranks = run, ranks
        self.node = node or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        # A run that was deleted and started anew has another id.
        identity = f"{run.read_identity().get('wandb_id')}:{trajectory}"
        key = f"{run.path.resolve()}:{identity}:{self.node}"
        self.path = storage.make_private(storage.memory_folder(key))
        # What has a rank that lives, or has just changed, isn't removed as left behind.
        storage.write_json(self.path / f"rank-{ranks.rank}.json", {"pid": os.getpid()})
        self.nodes: list[str] = ranks.gather_to_main(self.node) or []
        places = places_of(self.nodes) if ranks.is_main else None
        self.index, self.count, self.neighbour = ranks.dealt(places)
        self._ring = ranks.ring(self.neighbour) if self.neighbour else (ALONE, ALONE)
        self.source: dict[str, Any] | None = None
        self._newest = ""  # complete, of this attempt

    @property
    def _leads(self) -> bool:
        return self.index == 0

    def _folders(self) -> list[Path]:
        return [path for path in self.path.glob("step-*") if _NAME.fullmatch(path.name)]

    def clear(self, attempt: int, all_of_it: bool = False) -> None:
        """Remove the snapshots of an attempt and those before it, or all of the run; none may be
        under way. A newer attempt may have begun while this one was cut off: its own stay."""
        self._newest = ""
        self._ranks.merged(0, first)  # no rank still writes
        if not self._leads:
            return
        self._remove(attempt)
        if all_of_it and not self._folders():
            shutil.rmtree(self.path, ignore_errors=True)

    def _remove(self, attempt: int, spared: str = "") -> None:
        for path in self._folders():
            if path.name != spared and _numbers(path.name)[1] <= attempt:
                shutil.rmtree(path, ignore_errors=True)

    def store(
        self, snapshot: writer.Snapshot, attempt: int, ranks: Ranks, midway: writer.Midway
    ) -> int | None:
        """Write a snapshot into the memory of this node and of the next; return its bytes, on rank
        0. ranks: for this thread; midway: as in writer.write. Raises UserError on every rank if a
        node has no room for it."""
        folder = self.path / f"step-{snapshot.position.step:08d}.attempt-{attempt:04d}"

        def make_room() -> None:
            if not self._leads:
                return
            storage.make_private(self.path)  # whoever tidies up /dev/shm may have removed it
            self._remove(attempt, self._newest)
            # Another node's part is about as large.
            needed = snapshot.size * self.count * (2 if self.neighbour else 1)
            free = min(shutil.disk_usage(self.path).free, psutil.virtual_memory().available)
            free = min(free, _room_of_job())
            if free < needed:
                problem = (
                    f"a snapshot takes {needed:,} bytes of {self.path.parent}, {free:,} are free"
                )
                todo = "enlarge it (mount -o remount,size=..., or --shm-size of a container)"
                raise UserError("checkpoint.peer", problem, f"{todo}, or set the key to null")
            folder.mkdir()

        ranks.together(make_room, folder, first)
        size = writer.write_files(folder, attempt, snapshot, ranks, midway)
        if self.neighbour:
            self._exchange(folder, ranks)
        self._newest = folder.name
        return size

    def _exchange(self, folder: Path, ranks: Ranks) -> None:
        """Send the file of this rank to its neighbour's node, and receive that of the rank before.
        The first rank of a node sends also what describes the snapshot, where the node has it."""
        after, before = self._ring
        names = [rank_file(ranks.rank)]
        if self._leads:
            names += [p.name for p in folder.iterdir() if not p.name.startswith("rank-")]
        sizes = {name: (folder / name).stat().st_size for name in names}
        header = torch.tensor([*json.dumps(sizes).ljust(_HEADER).encode()], dtype=torch.uint8)
        after.swap(before, header, received := torch.empty_like(header))
        incoming: dict[str, int] = json.loads(bytes(received.numpy()))

        def take_room() -> None:
            for name, size in incoming.items():
                with open(folder / Path(name).name, "wb") as f:
                    os.posix_fallocate(f.fileno(), 0, size)  # so that no write fails later

        ranks.together(take_room, folder, first)
        for out, into in zip_longest(_blocks(folder, sizes), _blocks(folder, incoming)):
            after.swap(before, out, into)

    def snapshots(self, attempt: int, report: Report) -> dict[int, Callable[[], bool]]:
        """Return, by step, a function that publishes a snapshot as a checkpoint of the run; it
        returns False if the snapshot can't be used. Every rank calls it.

        attempt: the one that is starting. report: as in choice.newest_complete, of snapshots that
        are passed over.
        """
        here: dict[str, Any] = {}
        for folder in self._folders():
            # The ranks of a node read its files between them.
            names, table = sorted(os.listdir(folder))[self.index :: self.count], {}
            with suppress(UserError):
                table = (
                    {n: vars(e) for n, e in read_table(folder).items()} if TABLE in names else {}
                )
            here[folder.name] = names, table
        listed = self._ranks.gather_to_main(here) or []
        known = {name: table for each in listed for name, (_, table) in each.items() if table}

        def choose() -> list[str]:
            saves = self.run.read_events(kind="checkpoint_saved")
            names = {name for each in listed for name in each}
            return [name for name in sorted(names) if _counts(self.run, *_numbers(name), saves)]

        def publish(name: str) -> bool:
            files: dict[str, tuple[FileEntry, list[int]]] = {}
            places: dict[str, list[int]] = {}
            for r, each in enumerate(listed):
                for n in each.get(name, [()])[0]:
                    places.setdefault(n, []).append(r)
            for i, (n, entry) in enumerate(known.get(name, {}).items()):
                has = places.get(n, [])
                at = i % max(1, len(has))  # not all of them from the same node
                files[n] = FileEntry(**entry), has[at:] + has[:at]
            if fault := self._publish(attempt, name, files):
                report("snapshot_passed_over", step=_numbers(name)[0], reason=fault)
            return fault is None

        names = self._ranks.from_main(choose, self.run.checkpoints)
        return {_numbers(name)[0]: partial(publish, name) for name in names}

    def _publish(
        self, attempt: int, name: str, files: dict[str, tuple[FileEntry, list[int]]]
    ) -> str | None:
        """Copy a snapshot from nodes that have it, and publish it; return why that can't be. files:
        of its table, each with the ranks that have it, on rank 0."""
        run, ranks, (step, number) = self.run, self._ranks, _numbers(name)
        stage, table = (
            writer.stage_of(run, attempt, step),
            {n: entry for n, (entry, _) in files.items()},
        )
        sources: set[str] = set()
        damaged: dict[str, list[str]] = {n: [] for n in files}

        def shares() -> list[Any]:
            """Return what each rank copies: entries of files that it has. None: nothing is left, or
            a file is on no rank."""
            if not files or not all(has for _, has in files.values()):
                return [None] * ranks.size
            of_each: list[dict[str, Any]] = [{} for _ in range(ranks.size)]
            for n, (e, has) in files.items():
                of_each[has[0]][n] = vars(e)
            return of_each

        def copy() -> list[tuple[str, int, bool]]:
            mine = {n: FileEntry(**entry) for n, entry in share.items()}
            wholes = {n: _copy(self.path / name / n, stage / n) == e for n, e in mine.items()}
            return [(n, ranks.rank, is_whole) for n, is_whole in wholes.items()]

        def commit() -> str | None:
            if not table:
                return f"its {TABLE} is on no node that is alive"
            if lost := [n for n, (_, has) in files.items() if not has]:
                where = ", ".join(damaged[lost[0]])
                how = f"damaged in the memory of {where}" if where else "on no node that is alive"
                return f"{lost[0]} is {how}"
            try:
                rows = Checkpoint(stage).state["logged"]["metrics.jsonl"]
                history_of(run, Saved(step, number, FileEntry(**rows)))
            except UserError as e:
                return str(e)
            stored = max(run.checkpoint_steps(), default=0)
            storage.write_table(stage, table)
            writer.publish_stage(run, attempt, step)
            count, facts = len(sources), {"step": step, "nodes": len(sources), "stored": stored}
            where = f"the memory of {count} node{'s' * (count != 1)}"
            self.source = {**facts, "what": f"from {where}; the storage had step {stored:,}"}
            return None

        try:
            size = sum(entry.size for entry in table.values())
            ranks.from_main(partial(writer.make_stage, run, attempt, step, size), run.checkpoints)
            while (share := ranks.dealt(shares() if ranks.is_main else None)) is not None:
                for n, rank, is_whole in ranks.together_for_main(copy, stage, joined) or ():
                    (sources.add if is_whole else damaged[n].append)(self.nodes[rank])
                    files.pop(n) if is_whole else files[n][1].remove(rank)
            return ranks.from_main(commit, stage)
        except UserError as e:  # such as a full disk: an older checkpoint may count
            return str(e)
        finally:
            if ranks.is_main:  # gone, if it is published
                shutil.rmtree(stage, ignore_errors=True)


class PeerSaver(Saver):
    """Takes the snapshots of one attempt, as a Saver saves. One that fails is an event, and the run
    goes on."""

    _group = "peer"
    memory: PeerMemory

    def _publish(self, snapshot: writer.Snapshot, began: float, stall: float | None) -> None:
        ranks, attempt, step = self._ranks, self._attempt, snapshot.position.step
        kind, facts = "snapshot_saved", dict[str, Any]()
        try:
            # As before a save: no snapshot may hold a step that has no durable row.
            ranks.from_main(attempt.metrics.sync, attempt.metrics.path)
            facts["bytes"] = self.memory.store(snapshot, attempt.number, ranks, self._midway)
            facts |= {"seconds": time.perf_counter() - began, "stall_seconds": stall}
        except UserError as e:
            kind, facts = "snapshot_failed", {"error": str(e)}
            if ranks.is_main:
                print(f"forescale: no snapshot of step {step:,}: {e}", file=sys.stderr, flush=True)
        if ranks.is_main:
            with suppress(OSError, UserError):  # the run must not end with a record of a snapshot
                attempt.event(kind, step=step, **facts)


def _numbers(name: str) -> tuple[int, int]:
    """Return the step and the attempt in a snapshot's name."""
    step, attempt = _NAME.fullmatch(name).groups()  # type: ignore[union-attr]
    return int(step), int(attempt)


def _counts(run: Run, step: int, attempt: int, saves: Sequence[dict[str, Any]]) -> bool:
    """Return True if a snapshot is on the run's trajectory, and the storage lacks its step. saves:
    events of all attempts."""
    present = open_readable(run.checkpoint_path(step))
    is_stored = present is not None and run.is_eligible(present.attempt, step)
    # If the save before it was removed by hand, the run is to go back to an earlier one.
    before = [row["step"] for row in saves if row["attempt"] == attempt and row["step"] < step]
    parent = next((a.parent for a in run.attempts() if a.number == attempt), None)
    if not before and parent and parent.step > step_before(run):
        before = [parent.step]
    is_left = not before or run.checkpoint_path(max(before)).is_dir()
    return not is_stored and is_left and run.is_eligible(attempt, step)


def _room_of_job() -> float:
    """Return the bytes of memory that the cgroup of this process has left, if it has a limit: what
    lies in /dev/shm counts there, and the kernel would kill a rank for it."""
    with suppress(OSError, ValueError):
        path = Path("/proc/self/cgroup").read_text().split("::", 1)[1].splitlines()[0]
        folder = Path("/sys/fs/cgroup") / path.lstrip("/")
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = int(stat["inactive_file"]) + int(stat["active_file"])  # given up when needed
        used = int((folder / "memory.current").read_text()) - cached
        return int((folder / "memory.max").read_text()) - used  # ValueError: "max"
    return float("inf")


def places_of(nodes: Sequence[str]) -> list[tuple[int, int, int]]:
    """Return of each rank its number among those of its node, how many these are, and `_shift`."""
    shift, sizes, before = _shift(nodes), Counter(nodes), Counter[str]()
    places = []
    for node in nodes:
        places.append((before[node], sizes[node], shift))
        before[node] += 1
    return places


def _shift(nodes: Sequence[str]) -> int:
    """Return by how many ranks all ranks must shift to be on another node; 0 if there is none."""
    ranks = range(n := len(nodes))
    shifts = (s for s in ranks[1:] if n % s == 0 and all(nodes[r] != nodes[r - s] for r in ranks))
    return next(shifts, 0)


def _copy(source: Path, target: Path) -> FileEntry | None:
    """Copy a file, durably; return what was copied, None if there is none."""
    if not source.is_file():
        return None
    with HashingFile(target, beside=True) as out:
        for block in storage.blocks_of(source):
            out.write(block)
        return out.finish()


def _blocks(folder: Path, sizes: dict[str, int]) -> list[torch.Tensor]:
    """Return the content of files, mapped into memory: what is written there, is in the files."""
    files = ((str(folder / name), True, size) for name, size in sizes.items())
    maps = (torch.from_file(*file, dtype=torch.uint8) for file in files)
    return [block for each in maps for block in each.split(_BLOCK)]
