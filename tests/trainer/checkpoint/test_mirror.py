"""The copy of a run elsewhere: what is sent, when it counts, what goes."""

import shutil
import threading
import time

import pytest

from forescale.checkpoint import mirror as mirror_module
from forescale.checkpoint.mirror import Mirror, mirror_of
from forescale.checkpoint.reader import Checkpoint
from forescale.checkpoint.retention import Keep, delete, pin
from forescale.config.frozen import frozen_file, thaw
from forescale.config.train import TrainJob
from forescale.ground.errors import INTERRUPTED, UserError
from forescale.ground.storage import check_table
from forescale.remote.buckets import Folder
from forescale.remote.transfer import Unreachable
from forescale.resilience import launcher
from forescale.run.directory import Parent
from tests.trainer.checkpoint.mirrored import contents, mirror_job
from tests.trainer.small_run import make_job, save, train_row


def test_nothing_is_sent_twice(own_run, job, mirror, lines, monkeypatch):
    sent = []
    put = Folder.put
    monkeypatch.setattr(Folder, "put", lambda f, n, p: (sent.append(n), put(f, n, p))[1])
    mirror.sync()
    assert len(sent) == len(set(sent)) > 8
    sent.clear()
    mirror.sync()
    assert sent == []
    mirror_of(own_run, job, lines.append).sync()  # another process, later
    assert not [name for name in sent if name.startswith("checkpoints/")]


def test_a_checkpoint_that_was_made_anew_replaces_the_old_one(own_run, mirror, place):
    mirror.sync()
    path = own_run.checkpoint_path(8)
    old = contents(path)
    state = Checkpoint(path).state
    attempt = own_run.new_attempt()
    attempt.start_from(Parent(4, "checkpoints/step-00000004"), own_run)
    for step in range(5, 9):
        attempt.metrics.add(train_row(attempt, step))
    shutil.rmtree(path)
    from forescale.train.model import build_model

    job = thaw(TrainJob, own_run.config)
    save(own_run, attempt, 8, build_model(job, job.model.vocab_size))
    assert state["attempt"] != Checkpoint(path).attempt
    mirror.sync()
    there = place / own_run.name / "checkpoints" / "step-00000008"
    assert contents(there) == contents(path) != old
    assert not check_table(there)


def test_what_the_run_deleted_goes_once_something_newer_is_there(own_run, lines, place):
    mirror = Mirror(own_run, Folder(str(place)), Keep(newest=1), lines.append)
    mirror.sync()
    delete(own_run, 4)
    mirror.sync()
    assert Folder(str(place)).list().keys() >= {"checkpoints/step-00000008/files.json"}
    assert not (place / "checkpoints" / "step-00000004").exists()


def test_what_retention_deletes_while_it_is_sent_is_left(own_run, mirror, place, monkeypatch):
    path, put = own_run.checkpoint_path(4), Folder.put

    def put_late(folder, name, file):
        if file.parent == path and path.exists():
            shutil.rmtree(path)
        return put(folder, name, file)

    monkeypatch.setattr(Folder, "put", put_late)
    mirror.sync()
    there = place / own_run.name / "checkpoints"
    assert not check_table(there / "step-00000008")
    assert not (there / "step-00000004" / "files.json").exists()


def test_a_checkpoint_that_is_replaced_while_it_is_sent_is_sent_again(
    own_run, mirror, place, monkeypatch
):
    path, put, late = own_run.checkpoint_path(8), Folder.put, [True]

    def put_late(folder, name, file):
        if file == path / "files.json" and late and late.pop():
            file.write_bytes(file.read_bytes() + b" ")
        return put(folder, name, file)

    monkeypatch.setattr(Folder, "put", put_late)
    mirror.sync()
    there = place / own_run.name / "checkpoints" / "step-00000008"
    assert not (there / "files.json").exists()
    mirror.sync()
    assert contents(there) == contents(path)


def test_half_a_checkpoint_takes_no_place_of_a_whole_one(own_run, lines, place):
    mirror = Mirror(own_run, Folder(str(place)), Keep(newest=2), lines.append)
    mirror.sync()
    half = place / "checkpoints" / "step-00000006"
    half.mkdir()
    (half / "state.json").write_text("{}")
    shutil.rmtree(own_run.checkpoint_path(4))  # not by the rule
    Mirror(own_run, Folder(str(place)), Keep(newest=2), lines.append).sync()
    assert not check_table(place / "checkpoints" / "step-00000004")
    assert not half.exists()


def test_an_interrupted_process_does_not_wait_for_what_is_sent(own_run, mirror, monkeypatch):
    threads, put = [], Folder.put

    def put_here(folder, name, file):
        threads.append(threading.current_thread())
        return put(folder, name, file)

    monkeypatch.setattr(Folder, "put", put_here)
    mirror.start().sync()
    others = {thread for thread in threads if thread is not threading.current_thread()}
    assert others
    assert all(thread.daemon for thread in others)
    mirror.close()


def test_an_error_that_nobody_foresaw_harms_nothing(own_run, mirror, lines, monkeypatch):
    def broken(folder, name, file):
        raise ValueError("an answer that the package can't read")

    monkeypatch.setattr(Folder, "put", broken)
    mirror.close()
    assert lines[-1].startswith("The mirror is incomplete, the run is not affected: ValueError")


@pytest.mark.parametrize("why", ["keep", "pin", "nothing newer"])
def test_what_the_rule_keeps_stays_though_the_run_lost_it(own_run, lines, place, why):
    """A restored run has the newest checkpoint alone, and a purged scratch perhaps none."""
    mirror = Mirror(own_run, Folder(str(place)), Keep(2 if why == "keep" else 1), lines.append)
    mirror.sync()
    if why == "pin":
        pin(own_run, 4)
    for step in (4, 8) if why == "nothing newer" else (4,):
        shutil.rmtree(own_run.checkpoint_path(step))
    mirror.sync()
    assert not check_table(place / "checkpoints" / "step-00000004")


def test_a_pin_that_was_purged_with_its_checkpoint_still_holds(own_run, job, mirror, lines, place):
    pin(own_run, 4)
    mirror.sync()
    there = place / own_run.name / "checkpoints" / "step-00000004"
    (own_run.checkpoints / "step-00000004.pin").unlink()
    shutil.rmtree(own_run.checkpoint_path(4))
    Mirror(own_run, Folder(str(there.parents[1])), Keep(newest=1), lines.append).sync()
    assert not check_table(there)


def test_what_was_unpinned_is_unpinned_there(own_run, mirror, place):
    pin(own_run, 4)
    mirror.sync()
    assert list(place.rglob("*.pin"))
    pin(own_run, 4, off=True)
    mirror.sync()
    assert not list(place.rglob("*.pin"))


def test_a_job_that_is_to_end_waits_for_no_copy(own_run, mirror, lines, monkeypatch):
    """Such as at its time limit: it must still say how the run ended."""
    held = threading.Event()
    monkeypatch.setattr(Folder, "put", lambda f, n, p: held.wait(60))
    mirror.close(stop=lambda: True)
    held.set()
    assert lines[-1] == "The mirror is incomplete: the job is to end now."


def test_status_says_what_is_there_and_what_fails(own_run, job, mirror, place, forescale):
    own_run.config.write_bytes(frozen_file(job))
    mirror.close()
    assert f"Mirrored to {place}/small: up to step 8." in forescale("status", "small")[1]
    shutil.rmtree(place)
    place.write_text("a file where a directory should be")
    mirror_of(own_run, mirror_job(own_run, place), print).close()
    assert "nothing yet. It fails now:" in forescale("status", "small")[1]


def test_a_place_that_fails_is_told_of_once_and_harms_nothing(own_run, lines, tmp_path):
    (tmp_path / "full").write_text("a file where a directory should be")
    mirror = Mirror(own_run, Folder(str(tmp_path / "full" / "x")), Keep(), lines.append)
    with pytest.raises(UserError):
        mirror.check()
    mirror.close()
    assert len(lines) == 2
    assert "The mirror is incomplete, the run is not affected" in lines[1]


def test_a_place_that_is_away_keeps_only_a_new_run_from_beginning(
    own_run, mirror, lines, monkeypatch
):
    def away(folder):
        raise Unreachable(folder.where, "no answer", "check the network")

    monkeypatch.setattr(Folder, "list", away)
    mirror.check()
    assert len(lines) == 1
    assert lines[0].startswith("The mirror fails now, training goes on: ")
    shutil.rmtree(own_run.path / "attempts")
    with pytest.raises(Unreachable):
        mirror.check()


@pytest.mark.parametrize("wrong", ["relative/path", "https://host/x", "s3://b/x?a=b"])
def test_a_wrong_address_is_a_problem_of_the_config(small_data, tmp_path, wrong):
    with pytest.raises(UserError, match=r"checkpoint\.mirror"):
        make_job(small_data, tmp_path, "a", f"checkpoint.mirror='{wrong}'")


@pytest.mark.parametrize("is_late", [False, True])
def test_the_last_save_of_an_interrupted_run_is_copied_within_the_grace(
    own_run, place, forescale, monkeypatch, is_late
):
    """Its ranks save when they are asked to end; the job may end for good then."""

    def interrupted(run, command, sizes, grace, stop, template):
        stop.deadline = 0.0 if is_late else time.monotonic() + 60
        return INTERRUPTED

    monkeypatch.setattr(mirror_module, "_LOOK", 60.0)
    monkeypatch.setattr(launcher, "run_attempts", interrupted)
    put, held = Folder.put, threading.Event()

    def slow(folder, name, path):
        if is_late and name != "run.json":
            held.wait(60)
        return put(folder, name, path)

    monkeypatch.setattr(Folder, "put", slow)
    code, out, _ = forescale("train", "small", f"checkpoint.mirror={place}", "run.root=runs")
    held.set()
    assert code == INTERRUPTED
    assert ("The mirror is incomplete: the job is to end now." in out) == is_late
    if not is_late:
        assert not check_table(place / "small" / "checkpoints" / "step-00000008")
