"""What in our own code grows with ranks: how much of it 1,024, 4,096 and 16,384 have.

Ranks are simulated, 8 a node; functions, files and sockets are the real ones, on this one machine.
Invariant: a cell is measured at its number of ranks, but where its row has a star: that is computed
from what was measured. What a network takes is in none of them: only what our side of a collective
packs, where torch's own fake group, or copies of a word, stand for the others. The rows are those
of slurm/README.md.
"""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from forescale.checkpoint.choice import newest_complete
from forescale.checkpoint.peer import places_of
from forescale.checkpoint.reader import STATE, Checkpoint, Position
from forescale.checkpoint.writer import Snapshot, write
from forescale.engine.invariant import Grid
from forescale.engine.portable.fragments import Fragment, write_fragments
from forescale.engine.portable.strips import Series, rank_file
from forescale.engine.ranks import FANOUT, Merge, Ranks, Tree, first
from forescale.engine.selfcheck import common_hashes
from forescale.engine.world import StepSummary, World
from forescale.ground.storage import TABLE, FileEntry, check_files, shares_of
from forescale.resilience.diagnosis import stragglers
from forescale.resilience.heartbeat import Heartbeat, RankStatus, read_nodes, write_node
from forescale.resilience.rank_log import NodeLog
from forescale.run.directory import Parent, Run
from forescale.slurm.preflight.collect import Preflight
from forescale.slurm.preflight.findings import PreflightReport, Requirements
from tests.benchmarks.pairing import Result
from tests.benchmarks.processes import isolated

REAL, TOY = (1024, 4096, 16384), (16,)  # numbers of ranks
EACH = 8  # ranks a node
# Of a model as so many train one: 32 layers of 9 tensors, 3 beside them; AdamW.
PARAMETERS, STATES = 291, ("weight", "exp_avg", "exp_avg_sq")
MICRO_BATCHES = 4  # a rank and step
FLAT, CUT = "flat", "cut"  # stages 1 and 2: a rank has a run of all weights; 0 and 3: of each one
_MESH = 32  # ranks of a real group of gloo; at 8, 16, 32 and 64 what they take grew alike

ROWS = {  # what, where, how often, growth
    "shares": ("files of beats, all nodes", "shared storage", "10 s, replaced", "nodes"),
    "shared": ("bytes of them, all nodes", "shared storage", "10 s, replaced", "ranks"),
    "slow": ("look for stragglers", "rank 0", "30 s", "ranks"),
    "logs": ("files of nodes' logs", "shared storage", "an attempt", "nodes"),
    "imports": ("*metadata calls, slurm.pack=false", "shared storage", "an attempt", "ranks"),
    "packed": ("*the same by default", "shared storage", "an attempt", "nodes"),
    "preflight": ("preflight: all nodes heard", "batch script", "an attempt", "nodes"),
    "summary": (
        f"summary, {MICRO_BATCHES} micro-batches",
        "each rank",
        "a step",
        "to 1,024 of them",
    ),
    "losses": ("*of train.invariant: the losses", "each rank", "a step", "to 1,024 of them"),
    "alike": ("self-check: all ranks are alike", "rank 0", "a self-check", "log ranks"),
    "places": ("snapshots: which ranks share a node", "rank 0", "an attempt", "ranks"),
    "place": ("the same", "each rank", "an attempt", "constant"),
    "exchange": ("an exchange: an error, or none", "rank 0", "up to 9 a save", "log ranks"),
    "mesh": ("*open files of a tree of gloo groups", "rank 0", "held", "log ranks"),
    "met": ("*store's answers to make it", "rank 0", "a tree", "ranks"),
    "dealt": ("the table of files is read and dealt", "rank 0", "save, attempt", "ranks"),
    "table": ("a rank's share of the files checked", "each rank", "save, attempt", "constant"),
    "choose": ("choice of a checkpoint", "rank 0", "an attempt", "ranks"),
}
for _kind in (FLAT, CUT):
    ROWS |= {
        f"held, {_kind}": (f"save: words that rank 0 holds, {_kind}", "rank 0", "a save", "ranks"),
        f"commit, {_kind}": (f"save: state.json is made, {_kind}", "rank 0", "a save", "weights"),
        f"look, {_kind}": (f"state.json is read, {_kind}", "each rank", "save, attempt", "weights"),
    }
_COUNTED = {"shares": "files", "logs": "files", "mesh": "files"}
_COUNTED |= {"imports": "calls", "packed": "calls"}
_LINE = "{:40}| {:15}| {:20}| {:16}"

Cells = Iterator[tuple[str, float | None, float | None]]  # row, seconds, bytes or a count


class Line(Result):
    """A row of the table, seconds by numbers of ranks; bytes and all else are its facts."""

    def __str__(self) -> str:
        f = self.facts
        cells = [_spoken(*cell, f["unit"]) for cell in zip(self.rows[0], f["sizes"], strict=True)]
        begin = _LINE.format(self.name, f["where"], f["often"], f["growth"])
        return begin + "".join(f"|{cell:>19}" for cell in cells)


def measure(rounds: int, worlds: Sequence[int] = REAL) -> list[Result]:
    cells = isolated(simulate, tuple(worlds), min(rounds, 3))
    columns = "".join(f"|{n:>13,} ranks" for n in worlds)
    print(_LINE.format("what", "where", "how often", "growth") + columns, flush=True)
    labels, results = tuple(f"{n:,} ranks" for n in worlds), []
    for key, (name, where, often, growth) in ROWS.items():
        row, sizes = zip(*(cells[key, n] for n in worlds), strict=True)
        facts = {"where": where, "often": often, "growth": growth, "sizes": sizes}
        facts["unit"] = _COUNTED.get(key, "B")
        results.append(Line(name, "s", labels, [row], facts=facts))
    return results


def simulate(worlds: Sequence[int], rounds: int) -> dict[tuple[str, int], tuple]:
    """Seconds (0: none) and bytes (or a count) by row and number of ranks."""
    saves = (partial(save, FLAT), partial(save, CUT))
    parts = (beating, logs, imports, preflight, summaries, meetings, *saves)
    cells = {}
    for part, world in product(parts, worlds):
        with tempfile.TemporaryDirectory() as folder:
            for key, seconds, size in part(world, Path(folder), rounds):
                cells[key, world] = seconds or 0.0, size
    return cells


def beating(world: int, folder: Path, rounds: int) -> Cells:
    """All nodes say what a run says."""
    places = ("data", "forward", "backward", "norm", "update", "summary", "compute", "logging")
    beats, now, pace = [], time.time(), dict.fromkeys(places, 0.0123456)
    for rank in range(world):
        fields = (rank, f"node-{rank // EACH:04d}", 10_000 + rank, now - 9e3, now, 123_456)
        limits = ("compute", "backward", 0.1, 300.0, 300.0, False)
        beats.append(RankStatus(Heartbeat(*fields, *limits, pace, 29), 0.123))
    for i in range(0, world, EACH):
        write_node(folder, beats[i].heartbeat.host, beats[i : i + EACH])
    files = [path.stat().st_size for path in (folder / "heartbeat").iterdir()]
    yield "shares", None, len(files)
    yield "shared", None, sum(files)
    first, host = beats[:EACH], beats[0].heartbeat.host

    def look() -> object:
        every = [*first, *read_nodes(folder, without=host)]
        return stragglers([status.heartbeat for status in every], 1.5)

    yield "slow", _seconds(rounds, look), sum(files)


def logs(world: int, folder: Path, rounds: int) -> Cells:
    path = Run(folder).new_attempt().path
    for rank in range(world):
        log = NodeLog(path / f"node-{rank // EACH}.log", rank, rotates=False)
        os.write(log.end, b"step 1\n")
        log.close()
    yield "logs", None, len(list(path.glob("*.log*")))


def imports(world: int, folder: Path, rounds: int) -> Cells:
    """The calls that name a file, which a rank makes until it has imported what it needs."""
    yield "imports", None, (calls := _calls()) and calls * world
    yield "packed", None, world // EACH  # each asks for the size of the packed environment


@cache
def _calls() -> int | None:
    if shutil.which("strace") is None:
        return None
    trace = ["strace", "-f", "-c", "-e", "trace=%file", sys.executable, "-c"]
    names = "forescale.train.trainer, forescale.engine.build, deepspeed, accelerate"
    done = subprocess.run([*trace, f"import {names}"], capture_output=True, text=True, check=True)
    return int(re.findall(r"(\d+) +\d+ total", done.stderr)[-1])


def preflight(world: int, folder: Path, rounds: int) -> Cells:
    hosts = [f"node-{i:04d}" for i in range(world // EACH)]
    order = Requirements(str(folder), [], EACH, 0, None, None, 0, skew=60.0, reduce=False)

    def heard() -> PreflightReport:
        server = Preflight(order, hosts, "127.0.0.1")
        with ThreadPoolExecutor(len(hosts)) as pool:
            answers = [pool.submit(_node, server, host) for host in hosts]
            report = server.collect(lambda: False, 30.0)
        assert [node.result() for node in answers] == [b""] * len(hosts)
        assert not report.faults, report.faults[0].sentence
        return report

    size = len(json.dumps(asdict(heard()), indent=2))  # as it lies in the attempt
    yield "preflight", _seconds(rounds, heard), size


def _node(server: Any, host: str) -> bytes:
    """Says what a node that is well says, and stays until the line is closed."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as line:
        heard = line.makefile("rb")
        say = lambda word: line.sendall(json.dumps(word).encode() + b"\n")  # noqa: E731
        say({"token": server.token, "host": host, "time": time.time()})
        assert json.loads(heard.readline())["requirements"]
        facts = {"run_free": 1 << 50, "memory": 1 << 40, "cpus": 128, "gpus": ["H100"] * EACH}
        say({"facts": facts, "faults": [], "received": time.time(), "port": 40_000})
        return heard.readline()


def summaries(n: int, folder: Path, rounds: int) -> Cells:
    """Our side of World's collectives, in a group of torch's own that sends nothing."""
    dist.init_process_group("fake", rank=0, world_size=n, store=FakeStore())
    world = World(SimpleNamespace(process_index=0, num_processes=n, device=torch.device("cpu")))
    losses = torch.ones(MICRO_BATCHES)

    def step() -> StepSummary:
        world.share(1, losses, 0, MICRO_BATCHES * n, 1 << 60, False)
        return next(world.summaries(behind=0))

    reduce, sizes = dist.all_reduce, []
    dist.all_reduce = lambda part, **options: sizes.append(part.nbytes) or reduce(part, **options)
    yield "summary", _seconds(50 * rounds, step), sizes[0]
    grid, sizes[:] = Grid([torch.nn.Parameter(losses)], losses.device), []
    grid.sums([], losses, slice(MICRO_BATCHES), MICRO_BATCHES * n, world)
    yield "losses", None, sizes[0] - 16  # the squares of a parameter

    def echo(parts: list[torch.Tensor], mine: torch.Tensor, **_: Any) -> None:
        for part in parts:
            part.copy_(mine)

    # Each of the others says what this rank says.
    dist.all_gather, dist.gather = echo, lambda mine, parts, **_: echo(parts, mine)
    world.tree = Tree.of(0, n, lambda peers: Ranks(0, len(peers)))
    few, levels = 5 * rounds, world.tree.levels if world.tree else [world]
    size = sum(level.size for level in levels) * len(json.dumps((None, None)))
    yield "exchange", _seconds(few, lambda: world.together(lambda: None, merge=first)), size
    alike, per_level = {"": 1 << 63}, sum(level.size for level in levels)
    seconds = _seconds(few, lambda: world.merged(alike, common_hashes))
    yield "alike", seconds, per_level * len(json.dumps(alike))
    nodes = [f"node-{rank // EACH:04d}" for rank in range(n)]
    yield "places", _seconds(few, lambda: world.dealt(places_of(nodes))), len(json.dumps(nodes))
    yield "place", None, len(json.dumps(places_of(nodes)[-FANOUT:]))
    dist.destroy_process_group()


def meetings(world: int, folder: Path, rounds: int) -> Cells:
    """Gloo's meshes, of which every tree in the background is made."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    groups: set[tuple[int, ...]] = set()
    for rank in range(world):
        Tree.of(rank, world, lambda peers: groups.add(tuple(peers)))
    groups = groups or {tuple(range(world))}
    before, keys = len(os.listdir("/proc/self/fd")), dist.HashStore()
    meet = lambda rank: dist.ProcessGroupGloo(keys, rank, _MESH, timedelta(seconds=30))  # noqa: E731
    with ThreadPoolExecutor(_MESH) as pool:
        stores = list(pool.map(meet, range(_MESH)))
    extra = round((len(os.listdir("/proc/self/fd")) - before) / len(stores)) - _MESH
    yield "mesh", None, sum(len(peers) + extra for peers in groups if peers[0] == 0)
    key, each = len(keys.get(keys.list_keys()[0])), [len(peers) for peers in groups]
    yield "met", None, sum(n**2 * (8 * (n - _MESH) + key) for n in each)


class Simulated(Ranks):
    """Rank 0 of `size`: in an exchange all others say what it says; in `merged_to_main`, what
    `words` makes of it for a rank, or for a block of FANOUT of them.

    seconds: of its work between exchanges, and in its own merges; bytes: of the words that it holds
    for these.
    """

    def __init__(self, size: int, words: Callable[[Any, int, Merge], Any] | None = None):
        super().__init__(0, size)
        self.words, self.seconds, self.bytes = words, 0.0, 0
        self._left = time.perf_counter()

    def went_on(self) -> None:
        """What was done until now is not counted."""
        self._left = time.perf_counter()

    def gather(self, value: Any) -> list[Any]:
        self.seconds += time.perf_counter() - self._left
        self.went_on()
        return [value] * self.size

    def merged(self, value: Any, merge: Merge) -> Any:
        parts, left = value, self.size
        while left > 1:
            parts = merge([parts] * min(FANOUT, left))
            left = -(-left // FANOUT)
        self.seconds += time.perf_counter() - self._left
        self.went_on()
        return parts

    def merged_to_main(self, value: Any, merge: Merge) -> Any:
        assert self.words is not None
        self.seconds, stride = 0.0, 1
        while stride < self.size:
            others = range(stride, min(stride * FANOUT, self.size), stride)
            parts = [value, *(self.words(value, rank, merge) for rank in others)]
            self.bytes += sum(len(json.dumps(part)) for part in parts)
            self.went_on()
            value = merge(parts)
            self.seconds += time.perf_counter() - self._left
            stride *= FANOUT
        self.went_on()
        return value


def _cut(world: int, rank: int, kind: str) -> list[tuple[int, int, int]]:
    """(parameter, start, size) of what a rank writes of a state, where each has 8 x world."""
    if kind == CUT:
        return [(i, rank * 8, 8) for i in range(PARAMETERS)]
    first, end, each = rank * 8 * PARAMETERS, (rank + 1) * 8 * PARAMETERS, 8 * world
    bounds = sorted({first, end, *range(-(-first // each) * each, end, each)})
    return [(a // each, a % each, b - a) for a, b in pairwise(bounds)]


def save(kind: str, world: int, folder: Path, rounds: int) -> Cells:
    data, name = torch.zeros(8 * PARAMETERS), "model.layers.{}.attention.part-{}.weight"

    def fragments(rank: int) -> list[Fragment]:
        return [
            Fragment(name.format(*divmod(i, 9)), (8, world), state, start, data[:size])
            for i, start, size in _cut(world, rank, kind)
            for state in STATES
        ]

    def word(of_main: dict[str, Any], rank: int, merge: Merge) -> dict[str, Any]:
        """What a rank, or the first of a block of ranks, hands on of the files that they wrote:
        as long as what rank 0 does."""
        (stage,) = folder.glob("checkpoints/.*.stage")
        block = len(of_main["table"])
        table = dict(
            zip(map(rank_file, range(rank, rank + block)), of_main["table"].values(), strict=True)
        )
        if kind == CUT:  # all alike
            series = [Series.from_row(row) for row in of_main["fragments"]]
            moved = [replace(s, start=s.start + 8 * rank, rank=rank).row for s in series]
            return {**of_main, "table": table, "fragments": moved}
        words = []
        for each in range(rank, min(rank + block, world)):
            pieces = fragments(each)
            header, rows = write_fragments(stage / rank_file(each), pieces)
            series = [Series.of(each, row).row for row in rows]
            words.append({**of_main, "table": {rank_file(each): vars(header)}, "fragments": series})
            words[-1]["shapes"] = {f.name: list(f.shape) for f in pieces}
        return merge(words)

    run, rank = Run(folder), Simulated(world, word)
    attempt = run.new_attempt()
    attempt.start_from(Parent(0), run)
    snapshot = Snapshot(Position(1, 8, 64), fragments(0), {"optimizer_steps": {"all": 1}}, {})
    write(run, attempt.number, snapshot, rank)
    path = run.checkpoint_path(1)
    state, table = ((path / file).stat().st_size for file in (STATE, TABLE))
    yield f"held, {kind}", None, rank.bytes
    yield f"commit, {kind}", rank.seconds, state
    yield f"look, {kind}", _seconds(rounds, lambda: Checkpoint(path).fragments), state
    if kind == FLAT:
        chosen = Simulated(world)
        assert newest_complete(run, lambda *_, **__: None, chosen) is not None
        yield "choose", chosen.seconds, state + table
        yield "dealt", _seconds(rounds, lambda: shares_of(path, world)), table
        shares = shares_of(path, world)[:FANOUT]
        entries = [(file, FileEntry(**entry)) for file, entry in shares[-1]]
        words = len(json.dumps(shares))
        yield "table", _seconds(rounds, lambda: check_files(path, entries)), words


def _seconds(rounds: int, work: Callable[[], object]) -> float:
    return median(timeit.repeat(work, number=1, repeat=rounds))


def _spoken(seconds: float, size: float | None, unit: str) -> str:
    words = [f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"] if seconds else []
    if size is not None:
        power = next((p for p in (9, 6, 3) if unit == "B" and size >= 10**p), 0)
        unit = {9: "GB", 6: "MB", 3: "kB"}.get(power, unit)
        words.append(f"{size / 10**power:,.{2 if power else 0}f} {unit}")
    return ", ".join(words)
