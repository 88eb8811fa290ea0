"""The copy of a run elsewhere: what it holds, when it counts, what goes; and the way back."""

import shutil
import threading
from dataclasses import replace

import pytest

from forescale.checkpoint.copies import Taken
from forescale.checkpoint.mirror import Mirror, mirror_of
from forescale.checkpoint.reader import Checkpoint
from forescale.checkpoint.restore import restore
from forescale.checkpoint.retention import Keep, delete, pin
from forescale.config.frozen import frozen_file, thaw
from forescale.config.train import TrainJob
from forescale.data.remote.folder import Folder
from forescale.data.remote.transfer import Unreachable
from forescale.errors import UserError
from forescale.monitor.audit import check_run
from forescale.run.directory import Parent, Run
from forescale.slurm.submit import _refuse_second
from forescale.storage import check_table, read_json, write_checked_json, write_json
from tests.trainer.small_run import make_job, save, train_row


@pytest.fixture
def place(tmp_path):
    return tmp_path / "mirror"


def mirror_job(run, place):
    """The job of the run, mirrored."""
    job = thaw(TrainJob, run.config)
    here = replace(job.run, root="runs")
    return replace(job, run=here, checkpoint=replace(job.checkpoint, mirror=str(place)))


@pytest.fixture
def job(own_run, place):
    return mirror_job(own_run, place)


@pytest.fixture
def said():
    return []


@pytest.fixture
def mirror(own_run, job, said):
    return mirror_of(own_run, job, said.append)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_restored_run_is_the_run(own_run, job, mirror, said):
    mirror.close(finish=True)
    assert said[-1].endswith("up to step 8.")
    before = own_run.path.rename(own_run.path.with_name("before"))
    restore(job, said.append)
    assert "step 8" in said[-1]
    assert not check_run(own_run).faults
    after = Run(own_run.path)
    assert after.checkpoint_steps() == [8]
    assert contents(after.checkpoints / "step-00000008") == contents(
        before / "checkpoints" / "step-00000008"
    )
    assert after.metrics.read_bytes() == Run(before).metrics.read_bytes()
    assert (after.path / "metrics.jsonl").resolve() == after.metrics.resolve()
    restore(job, said.append)  # it is there: nothing more to do
    assert len([s for s in said if "Restored" in s]) == 1


def test_a_checkpoint_counts_only_when_it_is_there_whole(own_run, job, mirror, place, said):
    """At every file that can be the last one sent before a kill."""
    mirror.sync()
    there = place / own_run.name
    newest = there / "checkpoints" / "step-00000008"
    shutil.rmtree(own_run.path)
    for doomed in ("files.json", "state.json", "rank-00001.safetensors"):
        (newest / doomed).rename(there.with_name("aside"))
        restore(job, said.append)
        assert Run(own_run.path).checkpoint_steps() == [4]
        shutil.rmtree(own_run.path)
        there.with_name("aside").rename(newest / doomed)
    data = (newest / "state.json").read_bytes()
    (newest / "state.json").write_bytes(data[:-2] + b" }")  # of the same size
    restore(job, said.append)
    assert Run(own_run.path).checkpoint_steps() == [4]


def test_a_mirror_without_a_whole_checkpoint_is_refused(own_run, job, mirror, place, said):
    mirror.sync()
    shutil.rmtree(own_run.path)
    for table in place.rglob("files.json"):
        table.unlink()
    with pytest.raises(UserError, match="holds no whole checkpoint of the run"):
        restore(job, said.append)
    assert not own_run.path.exists()


def test_nothing_is_sent_twice(own_run, job, mirror, said, monkeypatch):
    sent = []
    put = Folder.put
    monkeypatch.setattr(Folder, "put", lambda f, n, p: (sent.append(n), put(f, n, p))[1])
    mirror.sync()
    assert len(sent) == len(set(sent)) > 8
    sent.clear()
    mirror.sync()
    assert sent == []
    mirror_of(own_run, job, said.append).sync()  # another process, later
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


def test_what_the_run_deleted_goes_once_something_newer_is_there(own_run, said, place):
    mirror = Mirror(own_run, Folder(str(place)), Keep(newest=1), said.append)
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


def test_half_a_checkpoint_takes_no_place_of_a_whole_one(own_run, said, place):
    mirror = Mirror(own_run, Folder(str(place)), Keep(newest=2), said.append)
    mirror.sync()
    half = place / "checkpoints" / "step-00000006"
    half.mkdir()
    (half / "state.json").write_text("{}")
    shutil.rmtree(own_run.checkpoint_path(4))  # not by the rule
    Mirror(own_run, Folder(str(place)), Keep(newest=2), said.append).sync()
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
    mirror.close(finish=False)


def test_an_error_that_nobody_foresaw_harms_nothing(own_run, mirror, said, monkeypatch):
    def broken(folder, name, file):
        raise ValueError("an answer that the package can't read")

    monkeypatch.setattr(Folder, "put", broken)
    mirror.close(finish=True)
    assert said[-1].startswith("The mirror is incomplete, the run is not affected: ValueError")


@pytest.mark.parametrize("why", ["keep", "pin", "nothing newer"])
def test_what_the_rule_keeps_stays_though_the_run_lost_it(own_run, said, place, why):
    """A restored run has the newest checkpoint alone, and a purged scratch perhaps none."""
    mirror = Mirror(own_run, Folder(str(place)), Keep(2 if why == "keep" else 1), said.append)
    mirror.sync()
    if why == "pin":
        pin(own_run, 4)
    for step in (4, 8) if why == "nothing newer" else (4,):
        shutil.rmtree(own_run.checkpoint_path(step))
    mirror.sync()
    assert not check_table(place / "checkpoints" / "step-00000004")


def test_a_mirror_that_is_ahead_is_not_overwritten(own_run, job, mirror, place, said):
    """The run was restored and trained elsewhere; then somebody starts the old directory."""
    mirror.sync()
    elsewhere = own_run.path.with_name("elsewhere")
    shutil.copytree(own_run.path, elsewhere, symlinks=True)
    other = Run(elsewhere)
    other.new_attempt().start_from(Parent(8, "checkpoints/step-00000008"), other)
    ahead = Mirror(other, Folder(f"{place}/{own_run.name}"), Keep(), said.append)
    ahead.close(finish=True)
    old = mirror_of(own_run, job, said.append)
    with pytest.raises(Taken, match="holds attempt 0002"):
        old.check()
    before = contents(place)
    # Both had been started before either began an attempt.
    own_run.new_attempt().start_from(Parent(8, "checkpoints/step-00000008"), own_run)
    with pytest.raises(Taken, match="got attempt 0002"):
        mirror._send_run()
    assert contents(place) == before


def test_an_attempt_of_the_same_number_from_elsewhere_is_not_overwritten(own_run, job, said, place):
    launch = own_run.attempts()[0].path / "launch.json"
    write_json(launch, {"begun": 1.0})
    mirror_of(own_run, job, said.append).sync()
    write_json(launch, {"begun": 1.0, "code": 0})  # it has ended meanwhile
    mirror_of(own_run, job, said.append).check()
    write_json(launch, {"begun": 2.0})
    before = contents(place)
    with pytest.raises(Taken, match="holds attempt 0001 of small, which isn't the one in"):
        mirror_of(own_run, job, said.append).check()
    assert contents(place) == before


@pytest.mark.parametrize("launched", ["here", "there", "nowhere"])
def test_an_attempt_that_torchrun_began_elsewhere_is_not_overwritten(
    own_run, job, said, place, launched
):
    """It has no launch.json."""
    other = Run(own_run.path.with_name("elsewhere"))
    shutil.copytree(own_run.path, other.path, symlinks=True)
    for run, where, loss in (own_run, "here", 1.0), (other, "there", 2.0):
        attempt = run.new_attempt()
        if where == launched:
            write_json(attempt.path / "launch.json", {"begun": 1.0})
        attempt.start_from(Parent(8, "checkpoints/step-00000008"), run)
        attempt.metrics.add(train_row(attempt, 9) | {"loss": loss})
    mirror_of(other, job, said.append).close(finish=True)
    mirror_of(other, job, said.append).check()
    before = contents(place)
    with pytest.raises(Taken, match="holds attempt 0002"):
        mirror_of(own_run, job, said.append).check()
    assert contents(place) == before


def test_another_run_of_the_same_name_is_not_overwritten(own_run, job, mirror, said, place):
    mirror.sync()
    before = contents(place)
    identity = read_json(own_run.identity)
    write_checked_json(own_run.identity, {**identity, "wandb_id": "other"})
    with pytest.raises(Taken, match="holds another run of the name small"):
        mirror_of(own_run, job, said.append).check()
    assert contents(place) == before


def test_a_run_is_no_mirror_of_itself(own_run, said):
    job = mirror_job(own_run, own_run.path.parent)
    with pytest.raises(UserError, match="is the run itself, not a copy of it"):
        mirror_of(own_run, job, said.append).check()


def test_a_pin_that_was_purged_with_its_checkpoint_still_holds(own_run, job, mirror, said, place):
    pin(own_run, 4)
    mirror.sync()
    there = place / own_run.name / "checkpoints" / "step-00000004"
    (own_run.checkpoints / "step-00000004.pin").unlink()
    shutil.rmtree(own_run.checkpoint_path(4))
    Mirror(own_run, Folder(str(there.parents[1])), Keep(newest=1), said.append).sync()
    assert not check_table(there)


def test_what_was_unpinned_is_unpinned_there(own_run, mirror, place):
    pin(own_run, 4)
    mirror.sync()
    assert list(place.rglob("*.pin"))
    pin(own_run, 4, off=True)
    mirror.sync()
    assert not list(place.rglob("*.pin"))


def test_a_job_that_is_to_end_waits_for_no_copy(own_run, mirror, said, monkeypatch):
    """Such as at its time limit: it must still say how the run ended."""
    held = threading.Event()
    monkeypatch.setattr(Folder, "put", lambda f, n, p: held.wait(60))
    mirror.close(True, stop=lambda: True)
    held.set()
    assert said[-1] == "The mirror is incomplete: the job is to end now."


def test_status_says_what_is_there_and_what_fails(own_run, job, mirror, place, forescale):
    own_run.config.write_bytes(frozen_file(job))
    mirror.close(finish=True)
    assert f"Mirrored to {place}/small: up to step 8." in forescale("status", "small")[1]
    shutil.rmtree(place)
    place.write_text("a file where a directory should be")
    mirror_of(own_run, mirror_job(own_run, place), print).close(finish=True)
    assert "nothing yet. It fails now:" in forescale("status", "small")[1]


def test_a_place_that_fails_is_told_of_once_and_harms_nothing(own_run, said, tmp_path):
    (tmp_path / "full").write_text("a file where a directory should be")
    mirror = Mirror(own_run, Folder(str(tmp_path / "full" / "x")), Keep(), said.append)
    with pytest.raises(UserError):
        mirror.check()
    mirror.close(finish=True)
    assert len(said) == 2
    assert "The mirror is incomplete, the run is not affected" in said[1]


def test_a_place_that_is_away_keeps_only_a_new_run_from_beginning(
    own_run, mirror, said, monkeypatch
):
    def away(folder):
        raise Unreachable(folder.where, "no answer", "check the network")

    monkeypatch.setattr(Folder, "list", away)
    mirror.check()
    assert len(said) == 1
    assert said[0].startswith("The mirror fails now, training goes on: ")
    shutil.rmtree(own_run.path / "attempts")
    with pytest.raises(Unreachable):
        mirror.check()


def test_a_fresh_run_of_a_mirrored_name_is_refused(own_run, job, mirror, said):
    mirror.sync()
    shutil.rmtree(own_run.path)
    never = replace(job, run=replace(job.run, resume="never"))
    with pytest.raises(UserError, match="holds a run of this name already"):
        restore(never, said.append)
    assert not own_run.path.exists()


def test_a_name_that_leads_out_is_refused(own_run, job, mirror, said, monkeypatch):
    mirror.sync()
    shutil.rmtree(own_run.path)
    names = Folder.list(Folder(f"{job.checkpoint.mirror}/{job.run.name}"))
    monkeypatch.setattr(Folder, "list", lambda f: {**names, "../../outside": 3})
    with pytest.raises(UserError, match="it is no mirror"):
        restore(job, said.append)
    assert not own_run.path.exists()


def test_an_attempt_that_was_half_sent_does_not_count(own_run, job, said, place):
    """After a rollback: a kill between its rows and its parent."""
    attempt = own_run.new_attempt()
    attempt.start_from(Parent(4, "checkpoints/step-00000004"), own_run)
    attempt.metrics.add(train_row(attempt, 5))
    mirror_of(own_run, job, said.append).sync()
    (place / own_run.name / "attempts/0002/parent.json").unlink()
    shutil.rmtree(own_run.path)
    restore(job, said.append)
    assert own_run.checkpoint_steps() == [8]
    assert not check_run(own_run).faults
    mirror_of(own_run, job, said.append).check()
    assert own_run.new_attempt().number == 3


ODD = ["checkpoints/step-abc/files.json", "checkpoints/step-00000012.bak/files.json"]
ODD += ["checkpoints/step-12/files.json", "checkpoints/step-00000008/code.py"]
ODD += ["jobs/0001/job.sbatch", "callbacks.py", "attempts/0001/.launch.json.17.tmp"]


def test_only_what_a_mirror_has_is_brought(own_run, job, mirror, said, place):
    """Others may have put copies beside it, or programs into it."""
    mirror.sync()
    shutil.rmtree(own_run.path)
    for odd in ODD:
        path = place / own_run.name / odd
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    restore(job, said.append)
    assert own_run.checkpoint_steps() == [8]
    assert not [odd for odd in ODD if (own_run.path / odd).exists()]


def test_directories_that_a_purge_has_left_are_no_run(own_run, job, mirror, said):
    mirror.sync()
    files = [p for p in own_run.path.rglob("*") if p.is_symlink() or p.is_file()]
    last = own_run.identity
    for path in files:
        if path != last:
            path.unlink()
    with pytest.raises(UserError, match=r"but other files, such as run\.json; move it"):
        restore(job, said.append)
    last.unlink()
    restore(job, said.append)
    assert own_run.checkpoint_steps() == [8]


def test_of_two_commands_that_restore_at_once_one_does(own_run, job, mirror, said, monkeypatch):
    mirror.sync()
    aside, get = own_run.path.rename(own_run.path.with_name("aside")), Folder.get

    def get_late(folder, name):
        if not own_run.path.exists():
            shutil.copytree(aside, own_run.path, symlinks=True)
            own_run.new_attempt()
        return get(folder, name)

    monkeypatch.setattr(Folder, "get", get_late)
    with pytest.raises(UserError, match="another command has made this run at the same moment"):
        restore(job, said.append)
    assert contents(own_run.path) == contents(aside)
    assert [attempt.number for attempt in own_run.attempts()] == [1, 2]


def test_a_restored_run_begins_a_submission_of_its_own(own_run, job, said, place):
    """Not with the crashes and the faulty nodes of the one before."""
    write_json(own_run.attempts()[0].path / "launch.json", {"slurm": {"submission": "0003"}})
    mirror_of(own_run, job, said.append).sync()
    shutil.rmtree(own_run.path)
    restore(job, said.append)
    folder = own_run.new_job()
    assert folder.name == "0004"
    _refuse_second(own_run, folder)  # nobody else submits it now


@pytest.mark.parametrize("wrong", ["relative/path", "https://host/x", "s3://b/x?a=b"])
def test_a_wrong_address_is_a_problem_of_the_config(small_data, tmp_path, wrong):
    with pytest.raises(UserError, match=r"checkpoint\.mirror"):
        make_job(small_data, tmp_path, "a", f"checkpoint.mirror='{wrong}'")
