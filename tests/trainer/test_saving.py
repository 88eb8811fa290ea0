"""A save behind the training: what it holds, what it waits for, and how it fails."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import disks
import plain_engine as plain
import pytest
import torch

from trainer import checkpoint, saving
from trainer.durable import check_table
from trainer.duration import Duration
from trainer.engine.state import HostCopy
from trainer.engine.world import Word
from trainer.errors import UserError
from trainer.parts import Checkpoints, Every
from trainer.retention import Keep, pin
from trainer.run import Run, read_rows
from trainer.saving import Saver
from trainer.stored import Checkpoint, newest_whole


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


class Gate:
    """Stands in for `midway`: the writer waits half-way until it is opened."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, step, path):
        self.reached.set()
        assert self.opened.wait(60)


def saver(run, attempt, engine, **more):
    return Saver(run, attempt, engine, more.pop("facts", dict), Keep(2), **more)


def save(saver, engine, step):
    plain.set_step(engine, step)
    saver.begin(plain.position(step))


def newest(run):
    """The step of the newest checkpoint, whole and of one piece; 0 if there is none."""
    found = newest_whole(run, lambda kind, **facts: pytest.fail(f"{kind} {facts}"))
    return plain.step_in(found) if found else 0


def hidden(run):
    return [p.name for p in run.checkpoints.glob(".*")] if run.checkpoints.exists() else []


def events(run, kind):
    rows = [row for a in run.attempts() for row in read_rows(a.events.path)]
    return [row for row in rows if row["kind"] == kind]


def test_it_holds_the_step_that_it_was_begun_at_however_the_training_goes_on(run):
    engine, gate = plain.engine(), Gate()
    seen = iter([{"guard": "then"}, {"guard": "later"}])
    part = saver(run, plain.begin(run), engine, midway=gate, facts=lambda: next(seen))
    save(part, engine, 1)
    assert gate.reached.wait(60)
    plain.set_step(engine, 2)  # the training has gone on, half of the file is written
    assert newest(run) == 0, "something half-written has a name"
    gate.opened.set()
    part.finish()
    assert newest(run) == 1
    assert Checkpoint(run.checkpoint_path(1)).state["guard"] == "then"
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
    from trainer.engine.state import Fragment

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


def refuse(error):
    def midway(step, path):
        if step == 2:
            raise OSError(error, os.strerror(error), str(path))

    return midway


@pytest.mark.parametrize("rank", [0, 2])
def test_what_fails_on_one_rank_fails_on_all_in_the_same_words(run, rank):
    ranks, attempt = plain.worlds(3), plain.begin(run)
    engines = [plain.engine(world) for world in ranks]
    harm = [refuse(errno.EDQUOT) if w.rank == rank else lambda *_: None for w in ranks]

    def train(world):
        part = saver(run, attempt, engines[world.rank], midway=harm[world.rank])
        save(part, engines[world.rank], 1)
        part.finish()
        save(part, engines[world.rank], 2)
        with pytest.raises(UserError) as caught:
            part.finish()
        assert part.failed
        return str(caught.value)

    said = plain.on_all(ranks, train)
    assert len({*said}) == 1
    assert "the disk quota is used up; free some space" in said[0]
    assert f"rank-{rank:05d}" in said[0]
    assert newest(run) == 1
    assert hidden(run) == []


def test_a_fault_surfaces_at_the_next_word_or_save(run):
    """The part raises when a word says that some rank's save has failed, not before."""
    engine, gate = plain.engine(), Gate()

    def midway(step, path):
        gate(step, path)
        refuse(errno.ENOSPC)(step, path)

    part = Checkpoints(
        Every(Duration(2), 2, 100), 2, run, plain.begin(run), engine, dict, midway=midway
    )

    class Step:
        def __init__(self, step):
            self.position = plain.position(step)

    def word(step, failed):
        return Word(step, [1.0], 0, False, failed, 0.0)

    part.see(Step(2), word(2, False))
    assert part.saved == 2
    part.see(Step(3), word(3, part.failed))  # in flight: nothing is known yet
    gate.opened.set()
    part._saver._thread.join()
    assert part.failed
    with pytest.raises(UserError, match="the disk is full"):
        part.see(Step(4), word(4, True))
    assert hidden(run) == []
    assert newest(run) == 0


def test_the_same_step_is_saved_once_unless_the_run_went_another_way_to_it(run):
    engine = plain.engine()
    part = Checkpoints(Every(Duration(2), 2, 100), 2, run, plain.begin(run), engine, dict)
    for _ in range(3):
        part.save(plain.position(2))
    assert len(events(run, "checkpoint_saved")) == 1
    part.save(plain.Position(2, 99, 256))
    assert len(events(run, "checkpoint_saved")) == 2


@pytest.mark.parametrize("background", [True, False])
def test_no_room_is_said_before_anything_is_written(run, monkeypatch, background):
    ranks, attempt = plain.worlds(2), plain.begin(run)
    engines = [plain.engine(world, width=64) for world in ranks]
    needed = sum(p.nbytes for p in engines[0].module.parameters()) * 3
    free = shutil.disk_usage(run.path)._replace(free=needed)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(checkpoint, "write_rank_file", lambda *_: pytest.fail("written"))

    def train(world):
        part = saver(run, attempt, engines[world.rank], background=background)
        save(part, engines[world.rank], 1)
        part.finish()

    said = [str(e) for e in plain.on_all(ranks, train)]
    assert said[0] == said[1]
    assert "the disk is full: a checkpoint needs " in said[0]
    assert f"{needed:,} are free; free some space" in said[0]
    assert list(run.checkpoints.iterdir()) == []


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """A saver on a small disk whose first checkpoint is published, and what the disk's fault must
    leave of it."""
    # As a quota would: what is free is not to be known beforehand.
    roomy = shutil.disk_usage(tmp_path)._replace(free=1 << 60)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: roomy)
    run, engine = Run(tmp_path / "run"), plain.engine(width=64)
    attempt = plain.begin(run)
    with disks.small_disk(run.checkpoints, "2m") as disk:
        part = saver(run, attempt, engine)
        save(part, engine, 1)
        part.finish()

        def expect(sentence):
            save(part, engine, 2)
            with pytest.raises(UserError) as caught:
                part.finish()
            assert sentence in str(caught.value)
            assert str(run.checkpoints) in str(caught.value)
            assert str(caught.value).count("\n") == 0
            assert newest(run) == 1
            assert run.checkpoint_steps() == [1]

        yield run, disk, expect


@pytest.mark.parametrize("leave", [0, 4096, 20_000, 100_000])
def test_a_disk_that_gets_full_while_writing(on_disk, leave):
    run, disk, expect = on_disk
    disks.fill(disk, leave)
    expect("the disk is full; free some space and give the same command again")
    assert hidden(run) == []


def test_a_directory_that_turns_read_only(on_disk):
    _, disk, expect = on_disk
    disks.make_read_only(disk)
    expect("the file system is read-only; choose a writable directory")


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_rename_that_fails(on_disk, monkeypatch, error):
    run, _, expect = on_disk
    rename = os.rename

    def failing(a, b):
        if str(b) == str(run.checkpoint_path(2)):
            raise OSError(error, os.strerror(error), str(a))
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    expect({errno.EIO: "I/O error", errno.EACCES: "permission denied"}.get(error, "Stale"))
    assert hidden(run) == []


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_an_fsync_that_fails(on_disk, monkeypatch, error):
    run, _, expect = on_disk

    def failing(fd):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", failing)
    expect("the disk is full" if error == errno.ENOSPC else "the storage reports an I/O error")
    assert hidden(run) == []


def test_a_bug_is_no_users_fault_and_is_not_swallowed(run):
    def broken(step, path):
        raise ZeroDivisionError

    engine = plain.engine()
    part = saver(run, plain.begin(run), engine, midway=broken)
    save(part, engine, 1)
    with pytest.raises(ZeroDivisionError):
        part.finish()
    assert part.failed
    assert newest(run) == 0


def test_an_attempt_left_behind_is_told_so_and_displaces_nothing(run):
    """A whole attempt that slept while a newer one went on: at any moment of its save."""
    engine, old = plain.engine(), plain.begin(run)
    slow = Gate()
    asleep = saver(run, old, engine, midway=slow)
    save(asleep, engine, 4)
    assert slow.reached.wait(60)
    new_engine, new = plain.engine(), plain.begin(run)
    part = saver(run, new, new_engine)
    save(part, new_engine, 2)
    part.finish()
    assert len(events(run, "leftovers_removed")) == 1
    slow.opened.set()
    with pytest.raises(UserError, match=r"attempt 2 has gone on|No such file"):
        asleep.finish()
    save(part, new_engine, 4)
    part.finish()
    save(asleep, engine, 6)
    with pytest.raises(UserError, match="attempt 2 has gone on from before step 6"):
        asleep.finish()
    assert run.checkpoint_steps() == [2, 4]
    assert newest(run) == 4
    assert Checkpoint(run.checkpoint_path(4)).attempt == new.number
    assert hidden(run) == []


def test_a_checkpoint_that_does_not_count_makes_way_and_a_pinned_one_stays_on_the_disk(run):
    engine = plain.engine()
    for pinned in (False, True):
        part = saver(run, plain.begin(run), engine)
        save(part, engine, 2)
        part.finish()
        if pinned:
            pin(run, 2)
    part = saver(run, plain.begin(run), engine)
    save(part, engine, 2)
    part.finish()
    assert Checkpoint(run.checkpoint_path(2)).attempt == 3
    assert hidden(run) == [".step-00000002.attempt-0002.pinned"]
    assert check_table(run.checkpoints / hidden(run)[0]) == []


def test_only_the_newest_attempt_sweeps_and_only_after_older_ones(run):
    engine, first = plain.engine(), plain.begin(run)
    second, third = plain.begin(run), run.new_attempt()
    names = [
        ".step-00000009.attempt-0001.stage",
        ".step-00000009.attempt-0003.stage",
        ".step-00000003.deleted",
        ".step-00000003.replaced",
        ".step-00000003.attempt-0001.pinned",
    ]
    for name in names:
        (run.checkpoints / name).mkdir(parents=True)
    part = saver(run, second, engine)
    save(part, engine, 1)
    part.finish()
    assert sorted(hidden(run)) == sorted(names), "there is a newer one"
    third.start_from(plain.Parent(1), run)
    part = saver(run, third, engine)
    save(part, engine, 2)
    part.finish()
    assert sorted(hidden(run)) == sorted([names[1], names[4]])
    assert first.number == 1
    assert saving.leftovers(run, 1) == []


def killed(folder, *words):
    """What killed_saves.py has met; it fails if anything was ever wrong on the disk."""
    script = Path(__file__).with_name("killed_saves.py")
    done = subprocess.run(
        [sys.executable, script, folder, *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_at_every_change_to_the_file_system(tmp_path):
    met = killed(tmp_path, "changes", 0)
    assert met["changes"] > 50
    assert min(met[kind] for kind in ("stage", "replaced", "deleted")) > 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_moments(tmp_path):
    """FORESCALE_KILLS says how often; each time in the midst of saving, or a little before."""
    kills = int(os.environ.get("FORESCALE_KILLS", "200"))
    met = killed(tmp_path, kills, seed := int.from_bytes(os.urandom(4)))
    print(f"{kills} kills with seed {seed}: {met}")
    assert met["published"] + met["not published"] > 0.8 * kills
    assert met["stage"] > 0.2 * kills, "few kills met a save"
