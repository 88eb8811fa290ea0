"""A save whose storage fails, that is killed, or whose attempt was left behind: the checkpoint
before it stays whole, and all ranks say the same."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forescale.checkpoint import saver as module
from forescale.checkpoint import writer
from forescale.checkpoint.reader import Checkpoint
from forescale.checkpoint.retention import delete, pin
from forescale.ground import errors, storage
from forescale.ground.errors import CRASHED, USER, Transient, UserError
from forescale.ground.storage import check_table
from forescale.run.directory import Run
from forescale.run.history import Saved, history_of
from tests import disks
from tests.trainer import plain_engine as plain
from tests.trainer.plain_engine import Gate, events, hidden, newest, save, saver


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    monkeypatch.setattr(errors, "PAUSES", (0.0, 0.0, 0.0))


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

    errors = plain.on_all(ranks, train)
    assert len({*errors}) == 1
    assert "the disk quota is used up; free some space" in errors[0]
    assert f"rank-{rank:05d}" in errors[0]
    assert newest(run) == 1
    assert hidden(run) == []


class Cough:
    """A storage that fails so many times while step 2 is written, and then works."""

    def __init__(self, error, times):
        self.error, self.times, self.calls = error, times, 0

    def __call__(self, step, path):
        self.calls += step == 2
        if step == 2 and self.calls <= self.times:
            raise OSError(self.error, os.strerror(self.error), str(path))


MOMENTARY = [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN]


@pytest.mark.parametrize("error", [*MOMENTARY, errno.ENOTCONN, errno.EAGAIN, errno.ENOENT])
@pytest.mark.parametrize("background", [True, False])
def test_storage_that_fails_for_a_moment_is_tried_again_on_all_ranks(
    run, capsys, error, background
):
    ranks, attempt, cough = plain.worlds(2), plain.begin(run), Cough(error, 2)
    engines = [plain.engine(world) for world in ranks]

    def train(world):
        midway = cough if world.rank == 1 else lambda *_: None
        part = saver(run, attempt, engines[world.rank], midway=midway, background=background)
        for step in (1, 2):
            save(part, engines[world.rank], step)
        part.finish()
        return part.failed

    assert plain.on_all(ranks, train) == [False, False]
    assert cough.calls == 3
    assert newest(run) == 2
    assert hidden(run) == []
    assert check_table(run.checkpoint_path(2)) == []
    retries = events(run, "save_retried")
    assert [event["step"] for event in retries] == [2, 2]
    assert all(os.strerror(error) in e["error"] or "I/O error" in e["error"] for e in retries)
    assert capsys.readouterr().err.count("the save of step 2 failed, next try in 0 s") == 2


@pytest.mark.parametrize(
    ("error", "tries", "code"),
    [
        *((error, 4, CRASHED) for error in MOMENTARY),
        *((e, 1, USER) for e in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM)),
        (errno.EROFS, 1, USER),
    ],
)
def test_only_what_the_user_must_mend_ends_a_run_for_good(run, error, tries, code):
    cough, engine = Cough(error, 99), plain.engine()
    part = saver(run, plain.begin(run), engine, midway=cough)
    for step in (1, 2):
        save(part, engine, step)
    with pytest.raises(UserError) as caught:
        part.finish()
    assert (cough.calls, caught.value.code) == (tries, code)
    assert isinstance(caught.value, Transient) == (code == CRASHED)
    assert ("(tried 4 times)" in str(caught.value)) == (code == CRASHED)
    assert newest(run) == 1
    assert hidden(run) == []


@pytest.mark.parametrize("background", [True, False])
def test_no_room_is_said_before_anything_is_written(run, monkeypatch, background):
    ranks, attempt = plain.worlds(2), plain.begin(run)
    engines = [plain.engine(world, width=64) for world in ranks]
    needed = sum(p.nbytes for p in engines[0].module.parameters()) * 3
    free = shutil.disk_usage(run.path)._replace(free=needed)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(writer, "write_rank_file", lambda *_: pytest.fail("written"))

    def train(world):
        part = saver(run, attempt, engines[world.rank], background=background)
        save(part, engines[world.rank], 1)
        part.finish()

    messages = [str(e) for e in plain.on_all(ranks, train)]
    assert messages[0] == messages[1]
    assert "the disk is full: a checkpoint needs " in messages[0]
    assert f"{needed:,} are free; free some space" in messages[0]
    assert list(run.checkpoints.iterdir()) == []


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """A saver on a small disk whose first checkpoint is published, and what the disk's fault must
    leave of it."""
    # As a quota would: what is free is not to be known beforehand.
    roomy = shutil.disk_usage(tmp_path)._replace(free=1 << 60)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: roomy)
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
    expect("the disk is full; free some space and run the same command again")
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
    with pytest.raises(UserError, match=r"attempt 2 started before|No such file"):
        asleep.finish()
    save(part, new_engine, 4)
    part.finish()
    save(asleep, engine, 6)
    with pytest.raises(UserError, match="attempt 2 started before step 6"):
        asleep.finish()
    assert run.checkpoint_steps() == [2, 4]
    assert newest(run) == 4
    assert Checkpoint(run.checkpoint_path(4)).attempt == new.number
    assert hidden(run) == []


def test_an_attempt_that_is_overtaken_while_it_publishes_puts_back_what_it_took(run, monkeypatch):
    """It had judged the old checkpoint, and slept until a newer attempt had saved the same step."""
    engine, newer = plain.engine(), plain.engine()
    part = saver(run, plain.begin(run), engine)
    save(part, engine, 2)
    part.finish()
    asleep = saver(run, plain.begin(run), engine)  # goes on from step 0: that one doesn't count
    real = writer.is_pinned

    def overtaken(*facts):
        monkeypatch.setattr(writer, "is_pinned", real)
        part = saver(run, plain.begin(run), newer)
        save(part, newer, 2)
        part.finish()
        return real(*facts)

    monkeypatch.setattr(writer, "is_pinned", overtaken)
    save(asleep, engine, 2)
    with pytest.raises(UserError, match="attempt 3 has saved this step, and this is attempt 2"):
        asleep.finish()
    assert Checkpoint(run.checkpoint_path(2)).attempt == 3
    assert check_table(run.checkpoint_path(2)) == []
    assert hidden(run) == []


def test_an_attempt_that_is_overtaken_while_it_deletes_puts_back_what_it_took(run):
    engine = plain.engine()
    part = saver(run, plain.begin(run), engine)
    save(part, engine, 2)
    part.finish()
    assert not delete(run, 2, lambda: False)
    assert check_table(run.checkpoint_path(2)) == []
    assert hidden(run) == []
    assert delete(run, 2)


def test_a_checkpoint_knows_what_was_logged_before_it(run):
    """Later rows of the attempt change nothing of it."""
    engine, attempt = plain.engine(), plain.begin(run)
    part = saver(run, attempt, engine)
    for step in (1, 2):
        attempt.metrics.add({"kind": "train", "step": step})
    save(part, engine, 2)
    part.finish()
    attempt.metrics.add({"kind": "validation", "step": 2})
    attempt.metrics.add({"kind": "train", "step": 3})
    logged = Checkpoint(run.checkpoint_path(2)).state["logged"]
    saved = Saved(2, attempt.number, storage.FileEntry(**logged["metrics.jsonl"]))
    history = history_of(run, saved)
    assert history.path == attempt.metrics.path
    lines = attempt.metrics.path.read_bytes()[: history.size].splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2]
    assert logged["events.jsonl"]["size"] == 0


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
    assert module.leftovers(run, 1) == []


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


@pytest.mark.slow  # a process for each change
def test_killed_at_every_change_to_the_file_system(tmp_path):
    met = killed(tmp_path, "changes", 0)
    assert met["changes"] > 50
    assert min(met[kind] for kind in ("stage", "replaced", "deleted")) > 2


@pytest.mark.slow  # 60 kills
@pytest.mark.timeout(3600)
def test_killed_at_random_moments(tmp_path):
    """FORESCALE_KILLS says how often; each time in the midst of saving, or a little before."""
    kills = int(os.environ.get("FORESCALE_KILLS", "60"))
    met = killed(tmp_path, kills, seed := int.from_bytes(os.urandom(4)))
    print(f"{kills} kills with seed {seed}: {met}")
    assert met["published"] + met["not published"] > 0.8 * kills
    assert met["stage"] > 0.05 * kills, "few kills met a save"
