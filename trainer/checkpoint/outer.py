"""The store of a run on several clusters: what its members exchange there, and who counts.

    STORE/run.json                     what all members have alike; of the first that came
    STORE/members/north.json           the run that is this member
    STORE/members/north-needs.json     the first step whose files it may still read
    STORE/step-00000500/
      north.0003/                      of its attempt 3: files as of a checkpoint (deltas)
      north.json                       the record of what it sent: which folder, the table's sha256
      decision.json                    the records that count
      south-joins.json                 a member that was left out comes back with this step

Invariant: every file but the -needs is created once, and never replaced. A record is created after
all files that it names were read back; the member that first creates a decision makes it for all,
so that all make the same outer step, whenever they come to it and however often. Imports no torch.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from forescale.config.sections.outer import OuterConfig
from forescale.ground.errors import UserError
from forescale.ground.foreign import parse_json
from forescale.ground.storage import TABLE, FileEntry, hash_file, read_table, write_file, write_json
from forescale.ground.typed import Built, Count, Flag, typed
from forescale.remote.buckets import Folder
from forescale.remote.transfer import Missing

T = TypeVar("T")
STATE = "state.json"
_LOOK = 5.0  # seconds at most between two looks for what others send
_RESTORE = "restore the file, or begin all members anew with another outer.store"


def _attempt_of_member(value: Any) -> str:
    """Return the name of a folder of files, which is read from the store, and removed here."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_-]+\.\d{4,}", value):
        raise ValueError("not a member and its attempt, such as north.0003")
    return value


@dataclass(frozen=True)
class Record:
    """What a member sent of a round. folder: below that of the step; table: sha256 of the table of
    its files; base: hash of the outer weights from which it set out; bytes: of its files; finite:
    each number of them is; steps: the length of its run."""

    folder: Annotated[str, Built(_attempt_of_member)]
    table: str
    base: str
    bytes: Count
    finite: Flag = True
    steps: Count = 0


@dataclass(frozen=True)
class Decision:
    """Who counts in a round, by name; decided_by: the member that was first to decide; refused: who
    sent numbers that are not finite."""

    members: dict[str, Record]
    decided_by: str
    refused: list[str] = field(default_factory=list)


class OuterStore:
    """The store of a run as one of its members uses it.

    run: what tells this member's run from any other; local: a folder for files on their way.
    """

    def __init__(self, config: OuterConfig, run: str, local: Path):
        assert config.store is not None
        assert config.member is not None
        address = config.store
        base = address if "://" in address else str(Path(address).expanduser())
        self._folder, self._config = Folder(base), config
        self.member, self.members = config.member, sorted(config.members)
        self.where, self._run, self.local = self._folder.where, run, local

    def join(self, facts: dict[str, Any]) -> None:
        """Enter this run as the member of its name. facts: what all members have alike. Raises
        UserError if the store has other facts, or another run has the name."""
        created = [self._folder.create("run.json", _json(facts)) for _ in range(2)]
        if created[1]:
            problem = (
                "replaces files that are to be created once, so members may decide differently"
            )
            way = "give a folder, or a bucket of a server with conditional writes (If-None-Match)"
            raise UserError(self.where, problem, way)
        stored = self._read(dict[str, Any], "run.json") or {}
        todo = "give all members the same, or another outer.store"
        for name in sorted(facts.keys() | stored.keys()):
            if stored.get(name) != facts.get(name):
                problem = (
                    f"the members began with {name.replace('_', ' ')} {stored.get(name)}, and "
                    f"{self.member} has {facts.get(name)}"
                )
                raise UserError(f"{self.where}/run.json", problem, todo)
        name = f"members/{self.member}.json"
        self._folder.create(name, _json({"run": self._run}))
        if (self._read(dict[str, str], name) or {}).get("run") != self._run:
            problem = f"another run is the member {self.member} already"
            todo = (
                "give another outer.member, or all runs of a branch another outer.store; if that "
                "run was deleted, delete this file, and the member takes the newest weights"
            )
            raise UserError(f"{self.where}/{name}", problem, todo)

    def decision(self, step: int) -> Decision | None:
        """Return who counts in the round of a step; None if that is not decided yet."""
        name = f"{_step(step)}/decision.json"
        decision = self._read(Decision, name)
        names = {*decision.members, *decision.refused} if decision else {*self.members}
        if not names or names - {*self.members}:
            problem = f"is damaged: it counts {', '.join(sorted(names)) or 'no member'}, of"
            raise UserError(self._at(name), f"{problem} {', '.join(self.members)}", _RESTORE)
        return decision

    def record(self, step: int, member: str | None = None) -> Record | None:
        """Return what a member, by default this one, sent of a round; None if it hasn't."""
        return self._read(Record, f"{_step(step)}/{member or self.member}.json")

    def announce(self, step: int) -> None:
        """Tell the others that this member, which was left out, takes part again in a round."""
        self._folder.create(f"{_step(step)}/{self.member}-joins.json", _json({}))

    def put(self, step: int, folder: str, path: Path) -> int:
        """Send a file of this member's; return its bytes."""
        return self._folder.put(f"{_step(step)}/{folder}/{path.name}", path).size

    def publish(self, step: int, folder: str, path: Path, **facts: Any) -> None:
        """Send the table of the files at `path`, which are all there, and create the record. facts:
        its further fields."""
        self.put(step, folder, path / TABLE)
        size = sum(entry.size for entry in read_table(path).values())
        record = Record(folder, hash_file(path / TABLE).sha256, bytes=size, **facts)
        self._folder.create(f"{_step(step)}/{self.member}.json", _json(asdict(record)))

    def decide(self, step: int, previous: int | None, stop: Callable[[], bool]) -> Decision | None:
        """Return who counts in a round, after this member has sent its files: once all members are
        there that are expected, or outer.wait has passed; None if `stop` returned True before.

        previous: the step of the round before. Whoever counted or was refused there or has
        announced itself is expected; without a round before, all are.
        """
        began, pause, known = time.monotonic(), 0.1, dict[str, Record]()
        before = self.decision(previous) if previous else None
        expected = {*before.members, *before.refused} if before else {*self.members}
        while (decision := self.decision(step)) is None and not stop():
            for name in self.members:
                if name not in known and (record := self.record(step, name)):
                    known[name] = record
                if self._read(dict[str, Any], f"{_step(step)}/{name}-joins.json") is not None:
                    expected.add(name)
            waited = time.monotonic() - began
            if expected <= known.keys() or waited > (self._config.wait.seconds or 0.0):
                counted = {name: r for name, r in sorted(known.items()) if r.finite}
                refused = sorted(known.keys() - counted.keys())
                facts = asdict(Decision(counted, self.member, refused))
                self._folder.create(f"{_step(step)}/decision.json", _json(facts))
            else:
                time.sleep(pause)
                pause = min(1.5 * pause, _LOOK)
        return decision

    def fetch_table(self, step: int, record: Record) -> int:
        """Copy the table of a member's files, and what describes them, to the local folder; return
        the bytes that were not here yet."""
        target = self.path_of(step, record)
        target.mkdir(parents=True, exist_ok=True)
        size = self._fetch(step, record, TABLE, record.table)
        if (state := read_table(target).get(STATE)) is None:
            where = self._at(f"{_step(step)}/{record.folder}/{TABLE}")
            raise UserError(where, f"has no {STATE}", _RESTORE)
        return size + self._fetch(step, record, STATE, state.sha256)

    def fetch(self, step: int, record: Record, part: tuple[int, int]) -> int:
        """Copy every n-th of a member's files from the i-th on, part (i, n), whose table is here;
        return the bytes that were not here yet."""
        table = read_table(self.path_of(step, record))
        names = sorted(table.keys() - {STATE})[part[0] :: part[1]]
        return sum(self._fetch(step, record, name, table[name].sha256) for name in names)

    def _fetch(self, step: int, record: Record, name: str, sha256: str) -> int:
        """Copy a file unless it is here; return the bytes. Raises UserError if it is another."""
        path = self.path_of(step, record) / name
        if path.is_file() and hash_file(path).sha256 == sha256:
            return 0
        remote = f"{_step(step)}/{record.folder}/{name}"
        try:
            entry: FileEntry = write_file(path, self._folder.get(remote))
        except (
            Missing
        ) as e:  # deleted, as this run goes on from a checkpoint before its newest ones
            raise UserError(self._at(remote), "doesn't exist any more", _RESTORE) from e
        if entry.sha256 != sha256:
            path.unlink()
            problem = "was changed since it was sent (its sha256 is not that of its table)"
            raise UserError(self._at(remote), problem, _RESTORE)
        return entry.size

    def path_of(self, step: int, record: Record) -> Path:
        """Return where a member's files are copied to."""
        return self.local_of(step) / record.folder

    def local_of(self, step: int) -> Path:
        """Return where the files of a round are copied to."""
        return self.local / _step(step)

    def prune(self, needs: int) -> None:
        """Note from which step on this member may read files, and delete those that no member needs
        any more. Records and decisions stay."""
        self.local.mkdir(exist_ok=True)
        note = self.local / f"{self.member}-needs.json"
        write_json(note, {"step": needs})
        self._folder.put(f"members/{note.name}", note)
        names = [f"members/{name}-needs.json" for name in self.members]
        first = min((self._read(dict[str, Count], name) or {}).get("step", 0) for name in names)
        # Whatever else is in the store is somebody's.
        sent = re.compile(rf"step-(\d{{8,}})/(?:{'|'.join(self.members)})\.\d{{4,}}(?=/[^/]+$)")
        rounds = {m[0]: int(m[1]) for m in map(sent.match, self._folder.list()) if m}
        for folder, step in sorted(rounds.items()):
            if step < first:
                self._folder.remove(folder, recursive=True)

    def _read(self, kind: type[T], name: str) -> T | None:
        """Return a file as `kind`; None if there is none. Raises UserError if it is damaged."""
        raw, where = self._folder.read(name), self._at(name)
        return None if raw is None else typed(kind, parse_json(raw, where), where, _RESTORE)

    def _at(self, name: str) -> str:
        return f"{self.where}/{name}"


def shapes_hash(shapes: dict[str, tuple[int, ...]]) -> str:
    """Return a short hash of the names and shapes of a model's parameters."""
    rows = json.dumps(sorted((name, [*shape]) for name, shape in shapes.items()))
    return hashlib.sha256(rows.encode()).hexdigest()[:16]


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _step(step: int) -> str:
    return f"step-{step:08d}"
