"""A save behind the training: what it holds, what it waits for, and what it says."""

import errno
import os
import threading

import pytest
import torch

from forescale.checkpoint.reader import Checkpoint
from forescale.config.sections.batch import Cadence
from forescale.engine.portable.fragments import HostCopy
from forescale.engine.world import StepSummary
from forescale.ground.errors import UserError
from forescale.run.directory import Run
from forescale.train.callbacks import Checkpoints, Every
from tests.trainer import plain_engine as plain
from tests.trainer.plain_engine import Gate, events, hidden, newest, save, saver


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def test_it_holds_the_step_that_it_was_begun_at_however_the_training_goes_on(run):
    engine, gate = plain.engine(), Gate()
    states = iter({"guard": {"losses": [], "norms": [], "anomalous_in_a_row": n}} for n in (3, 4))
    part = saver(run, plain.begin(run), engine, midway=gate, facts=lambda: next(states))
    save(part, engine, 1)
    assert gate.reached.wait(60)
    plain.set_step(engine, 2)  # the training has gone on, half of the file is written
    assert newest(run) == 0, "something half-written has a name"
    gate.opened.set()
    part.finish()
    assert newest(run) == 1
    assert Checkpoint(run.checkpoint_path(1)).state["guard"]["anomalous_in_a_row"] == 3
    assert hidden(run) == []


def test_at_most_one_is_in_flight(run):
    engine, gate = plain.engine(), Gate()
    part = saver(run, plain.begin(run), engine, midway=gate)
    save(part, engine, 1)
    second = threading.Thread(target=save, args=(part, engine, 2))
    second.start()
    assert gate.reached.wait(60)
    second.join(0.2)
    assert second.is_alive(), "the next save didn't wait for the one before"
    gate.opened.set()
    second.join(60)
    assert run.checkpoint_path(1).exists()
    part.finish()
    assert newest(run) == 2


def test_without_a_background_it_is_the_same_and_copies_nothing(run, tmp_path, monkeypatch):
    engine, other = plain.engine(), Run(tmp_path / "other")
    behind = saver(other, plain.begin(other), engine)
    save(behind, engine, 3)
    behind.finish()
    monkeypatch.setattr(HostCopy, "take", lambda *_: pytest.fail("copied"))
    part = saver(run, plain.begin(run), engine, background=False)
    save(part, engine, 3)
    assert newest(run) == 3
    names = sorted(p.name for p in run.checkpoint_path(3).iterdir())
    assert names == ["files.json", "rank-00000.safetensors", "state.json"]
    for name in names:
        same = [(r.checkpoint_path(3) / name).read_bytes() for r in (run, other)]
        assert same[0] == same[1]
    (event,) = events(run, "checkpoint_saved")
    assert event["stall_seconds"] == event["seconds"]


def test_the_event_says_what_it_cost(run):
    engine, gate = plain.engine(width=64), Gate()
    part = saver(run, plain.begin(run), engine, midway=gate)
    save(part, engine, 1)
    gate.opened.set()
    part.finish()
    (event,) = events(run, "checkpoint_saved")
    file = run.checkpoint_path(1) / "rank-00000.safetensors"
    assert (event["step"], event["bytes"]) == (1, file.stat().st_size)
    assert 0 < event["stall_seconds"] < event["seconds"]


def test_the_copy_reuses_its_memory_and_keeps_every_kind_of_number():
    from forescale.engine.portable.fragments import Fragment

    copy, kinds = HostCopy(), (torch.float32, torch.bfloat16, torch.int64, torch.bool)
    tensors = [torch.arange(5).to(kind) for kind in kinds]
    fragments = [Fragment(str(t.dtype), (5,), "weight", 0, t) for t in tensors]
    first = copy.take(fragments)
    where = [f.data.data_ptr() for f in first]
    for t in tensors:
        t.zero_()
    for f, kind in zip(first, kinds, strict=True):
        assert torch.equal(f.data, torch.arange(5).to(kind))
    assert [f.data.data_ptr() for f in copy.take(fragments)] == where
    assert not any(f.data.any() for f in first)  # it is the same memory


def test_files_are_durable_before_they_have_a_name_and_the_name_after(run, monkeypatch):
    """On a machine that goes down: rows, files, table, their directory, rename, its directory."""
    done, fsync, rename = [], os.fsync, os.rename

    def path_of(fd):
        return os.readlink(f"/proc/self/fd/{fd}")

    def noted_fsync(fd):
        fsync(fd)
        done.append(("fsync", path_of(fd)))

    def noted_rename(a, b):
        done.append(("rename", str(b)))
        rename(a, b)

    engine, attempt = plain.engine(), plain.begin(run)
    attempt.metrics.add({"kind": "train", "step": 1})
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    part = saver(run, attempt, engine, background=False)
    save(part, engine, 1)
    final = run.checkpoint_path(1)
    at = done.index(("rename", str(final)))
    before, after = done[:at], done[at + 1 :]
    stage = str(run.checkpoints / f".{final.name}.attempt-0001.stage")
    names = [name for kind, name in before if kind == "fsync"]
    assert str(attempt.metrics.path) in names
    assert f"{stage}/rank-00000.safetensors" in names
    assert any("state.json" in name for name in names)
    assert "files.json" in names[-3]  # the table, then the name of it, then all names
    assert names[-1] == stage
    assert after[0] == ("fsync", str(run.checkpoints))


def test_a_fault_surfaces_at_the_next_word_or_save(run):
    """The part raises when a word says that some rank's save has failed, not before."""
    engine, gate = plain.engine(), Gate()

    def midway(step, path):
        gate(step, path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    part = Checkpoints(
        Every(Cadence(2), 100), plain.saver(run, plain.begin(run), engine, midway=midway)
    )

    class Step:
        def __init__(self, step):
            self.position = plain.position(step)

    def summary(step, failed):
        return StepSummary(step, [1.0], 0, False, failed, 0.0)

    part.see(Step(2), summary(2, False))
    assert part.saved == 2
    part.see(Step(3), summary(3, part.failed))  # in flight: nothing is known yet
    gate.opened.set()
    part._saver._thread.join()
    assert part.failed
    with pytest.raises(UserError, match="the disk is full"):
        part.see(Step(4), summary(4, True))
    assert hidden(run) == []
    assert newest(run) == 0


def test_the_same_step_is_saved_once_unless_the_run_went_another_way_to_it(run):
    engine = plain.engine()
    part = Checkpoints(Every(Cadence(2), 100), plain.saver(run, plain.begin(run), engine))
    for _ in range(3):
        part.save(plain.position(2))
    assert len(events(run, "checkpoint_saved")) == 1
    part.save(plain.Position(2, 99, 256))
    assert len(events(run, "checkpoint_saved")) == 2
