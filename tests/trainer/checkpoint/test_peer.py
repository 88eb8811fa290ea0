"""Snapshots in the memory of nodes: which count, which never come back, and what is refused.

(With real ranks, kills and lost nodes: tests/distributed/test_peer.py.)"""

import os
import shutil
import signal
from types import SimpleNamespace

import psutil
import pytest

from forescale.checkpoint import peer, writer
from forescale.checkpoint.choice import newest_complete
from forescale.checkpoint.peer import PeerMemory, PeerSaver
from forescale.checkpoint.retention import Keep
from forescale.config.duration import Duration
from forescale.config.sections.runtime import CheckpointConfig
from forescale.ground import storage
from forescale.run.directory import Run
from tests.trainer import plain_engine as plain


@pytest.fixture
def run(tmp_path, monkeypatch):
    new = Run(tmp_path / "run")
    new.path.mkdir()
    data = {"path": "", "identity": "", "corpus_hash": "", "vocab_size": 2, "end_of_text": 0}
    data["sources"] = {}
    storage.write_checked_json(new.identity, {"dataset": data, "wandb_id": "first"})
    monkeypatch.setattr(storage, "_memory", lambda: tmp_path)
    return new


class Life:
    """One attempt, from `step` on, with its memory and both savers."""

    def __init__(self, run, step=0, node=None):
        self.engine = plain.engine()
        self.run, self.memory = run, PeerMemory(run, self.engine.world, node)
        self.attempt = plain.begin(run, step)
        parts = (run, self.attempt, self.engine, dict)
        self.step, self.snapshots = step, PeerSaver(*parts, Keep())
        self.snapshots.memory = self.memory
        self.saver = plain.saver(*parts[:3])

    def train(self, step, saver=None):
        """Log the steps up to `step`, and take a snapshot of it, or save it with `saver`."""
        for each in range(self.step + 1, step + 1):
            self.attempt.metrics.add({"kind": "train", "step": each})
        self.step, saver = step, saver or self.snapshots
        plain.save(saver, self.engine, step)
        saver.finish()


def resumed(run, node=None):
    """The step that another attempt would begin with, how often something was passed over, and
    what was said of the source."""
    memory, reports = PeerMemory(run, plain.World(), node), []
    number = run.new_attempt().number
    known = memory.snapshots(number, lambda *_, **facts: reports.append(facts["reason"]))
    newest = newest_complete(run, lambda kind, **facts: reports.append(kind), memory=known)
    return plain.step_in(newest) if newest else 0, reports, memory.source


def test_the_newest_counts_and_two_are_kept(run):
    life = Life(run)
    life.train(2, life.saver)
    for step in (3, 4, 5):
        life.train(step)
    assert life.memory.path.stat().st_mode & 0o777 == 0o700
    folders = sorted(p.name for p in life.memory.path.glob("step-*"))
    assert folders == ["step-00000004.attempt-0001", "step-00000005.attempt-0001"]
    step, reports, source = resumed(run)
    assert (step, reports, source["nodes"], source["stored"]) == (5, [], 1, 2)
    assert resumed(run)[::2] == (5, None), "from the storage: it has it by now"
    life.memory.clear(life.attempt.number, all_of_it=True)
    assert not life.memory.path.exists()


def test_what_an_abandoned_history_left_never_comes_back(run):
    life = Life(run)
    life.train(4, life.saver)
    life.train(6)
    other = Life(run, 4)  # a rollback, or a start that couldn't see the snapshot
    assert resumed(run)[0] == 4
    other.train(5)
    assert resumed(run)[0] == 5, "of the new history"


def test_a_checkpoint_removed_by_hand_takes_along_what_followed_it(run):
    life = Life(run)
    life.train(2, life.saver)
    life.train(4, life.saver)
    Life(run, 4).train(6)
    shutil.rmtree(run.checkpoint_path(4))
    assert resumed(run)[0] == 2


def test_an_attempt_that_was_cut_off_removes_nothing_of_a_newer_one(run):
    """Its network may come back with its ranks still alive."""
    old = Life(run)
    old.train(2, old.saver)
    new = Life(run, 2)
    new.train(3)
    old.train(4)
    old.memory.clear(old.attempt.number, all_of_it=True)
    assert resumed(run)[0] == 3


@pytest.mark.parametrize("gone", ["node", "run", "save", "rows", "table"])
def test_one_that_does_not_belong_to_what_is_there_is_left(run, gone):
    life = Life(run)
    life.train(2, life.saver)
    life.train(4, life.saver)
    life.train(6)
    (folder,) = life.memory.path.glob("step-*6.*")
    if gone == "run":  # deleted, and started anew
        storage.write_checked_json(run.identity, {**run.read_identity(), "wandb_id": "second"})
    elif gone == "save":  # deleted by hand, to go back
        shutil.rmtree(run.checkpoint_path(4))
    elif gone == "rows":
        rows = life.attempt.metrics.path
        rows.write_bytes(rows.read_bytes()[:-20])
    elif gone == "table":
        (folder / "files.json").unlink()
    step, reports, _ = resumed(run, "another" if gone == "node" else None)
    assert step == (2 if gone == "save" else 4)
    assert len(reports) == (gone in ("rows", "table")), reports
    assert plain.hidden(run) == []


def test_a_damaged_one_is_named_and_an_older_one_serves(run):
    life = Life(run)
    for step in (5, 6):
        life.train(step)
    (path,) = life.memory.path.glob("step-*6.*/rank-00000.safetensors")
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    step, (reason,), source = resumed(run, None)
    assert step == source["step"] == 5
    assert path.name in reason
    assert life.memory.node in reason


def test_one_that_has_no_room_is_left_out(run, monkeypatch):
    life = Life(run)
    life.train(1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    life.train(2)
    assert [e["step"] for e in plain.events(run, "snapshot_failed")] == [2]
    assert resumed(run)[0] == 1


@pytest.mark.parametrize("place", ["_copy", "history_of", "publish_stage"])
def test_a_kill_while_it_is_published_leaves_nothing_half(run, monkeypatch, place):
    life = Life(run)
    life.train(2, life.saver)
    life.train(3)
    if not (child := os.fork()):
        where = writer if place == "publish_stage" else peer
        monkeypatch.setattr(where, place, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        resumed(run)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert run.checkpoint_steps() == [2]
    assert resumed(run)[:2] == (3, [])


def test_the_neighbour_is_on_another_node():
    nodes = {"a": 0, "aa": 0, "ab": 1, "aabb": 2, "abab": 1, "aabbcc": 2, "aaab": 0}
    assert {each: peer._shift([*each]) for each in nodes} == nodes
    assert peer.places_of([*"aabb"]) == [(0, 2, 2), (1, 2, 2), (0, 2, 2), (1, 2, 2)]
    assert peer.places_of([*"aba"]) == [(0, 2, 0), (0, 1, 0), (1, 2, 0)]


def test_the_key_needs_a_copy_in_the_background():
    minutes = {"peer": Duration.parse("2 min")}
    assert [*CheckpointConfig(**minutes).problems()] == []
    ((key, *_),) = CheckpointConfig(**minutes, background=False).problems()
    assert key == "peer"
