"""What a save costs: how long training stands still for one that is written behind it, against one
that it waits for; and the whole save against plain writing of the same bytes with fsync.

On one rank, on a model whose weights and AdamW moments are over 300 MB, in the directory for
temporary files. All in one process, in turns, with nothing else going on; what training behind a
save costs is told beside it.
"""

import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.pairing import Result
from tests.benchmarks.processes import isolated
from tests.benchmarks.sizes import TOY_TRAINING, TrainingSizes

_MODEL = ("model.num_layers=5", "model.width=640", "model.num_heads=10", "model.mlp_width=2560")
_BATCH = ("train.sequence_length=64", "train.global_batch=8", "train.micro_batch=8")
# Its steps are those of training, to see what a save behind it costs.
REAL = TrainingSizes(6, (*_MODEL, *_BATCH, "train.compile=off"))
TOY = TOY_TRAINING
_BLOCK = 1 << 22


def measure(rounds: int, sizes: TrainingSizes = REAL) -> list[Result]:
    return isolated(compare, rounds, sizes)


def compare(rounds: int, sizes: TrainingSizes) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), sizes)
        bench.turn()  # warms up: memory is taken
        bench.take_data()
        turns = [bench.turn() for _ in range(rounds)]
        behind = [bench.training() for _ in range(min(rounds, 3))]
        bench.snapshots.memory.clear(bench.attempt.number, all_of_it=True)
    facts = {"bytes": bench.bytes, "parameters": bench.parameters}
    stall = [(t["stall"], t["waited"]) for t in turns]
    whole = [(t["behind"], t["plain"]) for t in turns]
    waited = [(t["waited"], t["plain"]) for t in turns]
    snapshots = [(t["snapshot"], t["behind"]) for t in turns]
    steps = {name: median(t[name] for t in behind) for name in ("alone", "beside a save")}
    return [
        Result(
            "save, the stall of training",
            "s",
            ("written behind it", "waited for"),
            stall,
            "at most 0.25",
            facts | {"first copy, which takes the memory (s)": bench.first_stall},
        ),
        Result(
            "save, the whole of it",
            "s",
            ("behind training", "plain writing with fsync"),
            whole,
            "at most 1.5",
            {f"seconds a training step, {name}": value for name, value in steps.items()},
        ),
        Result("save, waited for", "s", ("ours", "plain writing with fsync"), waited),
        Result(
            "training beside it, a step",
            "s",
            ("a snapshot in memory", "a save"),
            [(t["beside a snapshot"], t["beside a save"]) for t in behind],
            facts={"seconds a step, alone": steps["alone"]},
        ),
        Result("the whole of it", "s", ("a snapshot in memory", "a save"), snapshots),
    ]


class Bench:
    """An engine that has trained a step, its two ways to save, and plain writing."""

    def __init__(self, folder: Path, sizes: TrainingSizes):
        from forescale.checkpoint.peer import PeerMemory, PeerSaver
        from forescale.checkpoint.retention import Keep
        from forescale.checkpoint.saver import Saver
        from forescale.engine import build
        from forescale.run.directory import Parent
        from forescale.train.model import build_model
        from forescale.train.trainer import Trainer
        from tests.benchmarks.training import batches, make_job, world

        world.set_environment()
        job = make_job(folder, sizes, "optimizer=adamw")
        rank = Trainer(job, time.monotonic())
        job, self.run, self.attempt = rank.job, rank.run, rank.attempt
        module = build_model(job, rank.sources.vocab_size)
        self.parameters = sum(p.numel() for p in module.parameters())
        self.engine = build.build_engine(rank.world, module, job)
        self.batches = batches(job, rank.sources, sizes.steps)
        self.engine.train_step(self.batches[0], 1e-3)  # makes the moments
        self.attempt.start_from(Parent(0), self.run)
        self.step, self.folder, self.bytes, self.first_stall = 0, folder, 0, 0.0
        self.data = memoryview(b"")
        arguments = (self.run, self.attempt, self.engine, dict, Keep(2))
        self.behind, self.waited = Saver(*arguments), Saver(*arguments, background=False)
        self.snapshots = PeerSaver(*arguments)
        self.snapshots.memory = PeerMemory(self.run, rank.world)

    def turn(self) -> dict[str, float]:
        """Seconds of each, one after the other."""
        snapshot = self.save(self.snapshots, "snapshot_saved")
        behind, waited = self.save(self.behind), self.save(self.waited)
        self.bytes = behind["bytes"]
        self.first_stall = self.first_stall or behind["stall_seconds"]
        return {
            "stall": behind["stall_seconds"],
            "behind": behind["seconds"],
            "snapshot": snapshot["seconds"],
            "waited": waited["seconds"],
            "plain": self.plain(),
        }

    def take_data(self) -> None:
        """What plain writing writes: the last checkpoint's tensors."""
        path = self.run.checkpoint_path(self.step) / "rank-00000.safetensors"
        self.data = memoryview(path.read_bytes())

    def save(self, saver: Any, event: str = "checkpoint_saved") -> dict[str, Any]:
        """The event of a save that nothing goes on beside."""
        from forescale.checkpoint.reader import Position
        from forescale.run.rows import read_rows

        self.step += 1
        self._settle()
        saver.begin(Position(self.step))
        saver.finish()
        return read_rows(self.run.events, kind=event)[-1]

    def plain(self) -> float:
        """Seconds to write the bytes of a checkpoint's tensors from memory, and fsync."""
        self._settle()
        copy = self.folder / "plain"
        began = time.perf_counter()
        with open(copy, "wb", buffering=0) as f:
            for start in range(0, len(self.data), _BLOCK):
                f.write(self.data[start : start + _BLOCK])
            os.fsync(f.fileno())
        seconds = time.perf_counter() - began
        copy.unlink()
        return seconds

    def _settle(self) -> None:
        """The same for whoever writes next: nothing waits for the disk, and as much memory as will
        be written has just been used. A virtual machine may have to ask for it else."""
        scratch = self.folder / "scratch"
        scratch.write_bytes(self.data)
        scratch.unlink()
        os.sync()

    def training(self) -> dict[str, float]:
        """Seconds a step, alone and while a save or a snapshot is written behind it."""
        from forescale.checkpoint.reader import Position

        seconds = {"alone": self._steps()}
        for name, saver in (("a save", self.behind), ("a snapshot", self.snapshots)):
            self.step += 1
            saver.begin(Position(self.step))
            seconds[f"beside {name}"] = self._steps()
            saver.finish()
        return seconds

    def _steps(self) -> float:
        began = time.perf_counter()
        for batch in self.batches:
            self.engine.train_step(batch, 1e-3)
        return (time.perf_counter() - began) / len(self.batches)
