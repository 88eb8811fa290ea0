"""Snapshots in the memory of two nodes, on real ranks: what a kill, a lost node and a damaged part
leave, the run ends with the same bits. Ranks of one machine are told that they are on two nodes."""

import json
import shutil
from pathlib import Path

import pytest

from tests import launching
from tests.distributed import ranks

pytestmark = pytest.mark.distributed

JOB = ("train.tokens=null", "train.steps=12", "validation.every=12", "train.invariant=true")
JOB += ("engine=zero2", "checkpoint.every=5", "checkpoint.peer=2")
NODES = ["a", "a", "b", "b"]


def memories():
    """The folders of this user's memory that hold snapshots."""
    return {path.parent for path in Path("/dev/shm").glob("forescale-*/step-*")}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


class Runs:
    """A run of 4 ranks on two nodes, again and again as it was when a rank was killed."""

    def __init__(self, folder, dataset):
        self.whole = launching.train(folder, "run.name=whole", f"data.path={dataset}", *JOB)
        self.whole = launching.trajectory(folder / "whole")
        self.run, self.backup = folder / "cut", folder / "backup"
        words = [f"run.root={folder}", "run.name=cut", f"data.path={dataset}", *JOB]
        self.words = [*words, *launching.SHORT, *launching.TINY]
        before = memories()
        self.end("late")
        self.memories = sorted(memories() - before)
        assert len(self.memories) == 2
        for path in (self.run, *self.memories):
            shutil.copytree(path, self.backup / path.name)

    def reset(self):
        for path in (self.run, *self.memories):
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(self.backup / path.name, path)
            path.chmod(0o700)

    def end(self, kill):
        # By its signal, or first a rank that it leaves alone, whose collective fails.
        with pytest.raises(AssertionError, match=r"ended with -9|(reset|closed) by peer"):
            self.start(NODES, kill)

    def start(self, nodes, kill=None):
        words = [*self.words, f"launch.processes={len(nodes)}"]
        return ranks.run("peer_scenarios:train", len(nodes), words=words, nodes=nodes, kill=kill)

    def resumed(self, nodes=NODES):
        """Go on to the end; return the first step, on how many nodes it was (None: not there), and
        why others were passed over."""
        assert self.start(nodes) == 0
        assert launching.trajectory(self.run) == self.whole
        newest = sorted(self.run.glob("attempts/*"))[-1]
        rows = [json.loads(line) for line in (newest / "events.jsonl").read_text().splitlines()]
        used = [row["nodes"] for row in rows if row["kind"] == "snapshot_used"]
        reasons = [row["reason"] for row in rows if row["kind"] == "snapshot_passed_over"]
        step = json.loads((newest / "parent.json").read_text())["step"]
        return step, used[0] if used else None, reasons


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset):
    cut = Runs(tmp_path_factory.mktemp("peer"), dataset)
    yield cut
    for path in cut.memories:
        shutil.rmtree(path, ignore_errors=True)


def test_a_lost_rank_or_node_costs_the_steps_since_the_snapshot(runs):
    runs.reset()
    assert runs.resumed() == (8, 2, [])
    assert not memories() & {*runs.memories}, "the end of the run removes them"
    for number in (0, 1):
        runs.reset()
        shutil.rmtree(runs.memories[number])
        assert runs.resumed() == (8, 1, [])


def test_other_nodes_and_fewer_ranks_take_what_a_node_that_stays_has(runs):
    runs.reset()
    assert runs.resumed(["c", "b"]) == (8, 1, [])


def test_without_any_memory_the_storage_counts(runs):
    runs.reset()
    assert runs.resumed(["c", "c", "d", "d"]) == (5, None, [])


def test_a_damaged_part_comes_from_the_other_node_else_the_storage_counts(runs):
    runs.reset()
    flip(runs.memories[0] / "step-00000008.attempt-0001" / "rank-00002.safetensors")
    assert runs.resumed()[::2] == (8, [])
    runs.reset()
    for memory in runs.memories:
        for path in memory.glob("step-*/rank-00002.safetensors"):
            flip(path)
    step, nodes, reasons = runs.resumed()
    assert (step, nodes, len(reasons)) == (5, None, 2)
    assert all("rank-00002.safetensors is damaged in the memory of" in each for each in reasons)


def test_a_kill_while_one_is_published_or_arrives_changes_nothing(runs):
    runs.reset()
    runs.end("flush")
    runs.end("flush")
    assert runs.resumed() == (8, 2, [])
    shutil.rmtree(runs.run)
    runs.end("arrival")
    step, nodes, _ = runs.resumed()
    assert step in (2, 4), nodes


@pytest.mark.parametrize(("size", "shift"), [(3, 1), (4, 2), (4, 1)])
def test_each_rank_receives_from_the_one_before(size, shift):
    received = ranks.run("peer_scenarios:ring", size, shift=shift)
    assert received == [(rank - shift) % size for rank in range(size)]


def test_on_one_machine_the_launcher_starts_again_from_memory(tmp_path, dataset):
    command = (f"data.path={dataset}", *JOB, "launch.processes=2", "checkpoint.every=12")
    launching.train(tmp_path, "run.name=whole", *command)
    kills = "faults=[kill@7:rank1,kill@9:rank0:write]"  # the second within a snapshot
    output = launching.train(tmp_path, "run.name=cut", *command, kills)
    assert launching.trajectory(tmp_path / "cut") == launching.trajectory(tmp_path / "whole")
    assert output.count("there is no other node") == 3, "once a launch"
    assert launching.events(tmp_path / "cut").count("snapshot_used") == 2
