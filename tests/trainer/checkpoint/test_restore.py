"""A run that lost its directory comes back from its mirror: what counts there, what is brought."""

import shutil
from dataclasses import replace

import pytest

from forescale.checkpoint.mirror import mirror_of
from forescale.checkpoint.restore import restore
from forescale.ground.errors import UserError
from forescale.ground.storage import write_json
from forescale.monitor.audit import check_run
from forescale.remote.buckets import Folder
from forescale.run.directory import Parent, Run
from forescale.slurm.submit import _refuse_second
from tests.trainer.checkpoint.mirrored import contents
from tests.trainer.small_run import train_row


def test_a_restored_run_is_the_run(own_run, job, mirror, lines):
    mirror.close()
    assert lines[-1].endswith("up to step 8.")
    before = own_run.path.rename(own_run.path.with_name("before"))
    restore(job, lines.append)
    assert "step 8" in lines[-1]
    assert not check_run(own_run).faults
    after = Run(own_run.path)
    assert after.checkpoint_steps() == [8]
    assert contents(after.checkpoints / "step-00000008") == contents(
        before / "checkpoints" / "step-00000008"
    )
    assert after.metrics.read_bytes() == Run(before).metrics.read_bytes()
    assert (after.path / "metrics.jsonl").resolve() == after.metrics.resolve()
    restore(job, lines.append)  # it is there: nothing more to do
    assert len([s for s in lines if "Restored" in s]) == 1


def test_a_checkpoint_counts_only_when_it_is_there_whole(own_run, job, mirror, place, lines):
    """At every file that can be the last one sent before a kill."""
    mirror.sync()
    there = place / own_run.name
    newest = there / "checkpoints" / "step-00000008"
    shutil.rmtree(own_run.path)
    for doomed in ("files.json", "state.json", "rank-00001.safetensors"):
        (newest / doomed).rename(there.with_name("aside"))
        restore(job, lines.append)
        assert Run(own_run.path).checkpoint_steps() == [4]
        shutil.rmtree(own_run.path)
        there.with_name("aside").rename(newest / doomed)
    data = (newest / "state.json").read_bytes()
    (newest / "state.json").write_bytes(data[:-2] + b" }")  # of the same size
    restore(job, lines.append)
    assert Run(own_run.path).checkpoint_steps() == [4]


def test_a_mirror_without_a_whole_checkpoint_is_refused(own_run, job, mirror, place, lines):
    mirror.sync()
    shutil.rmtree(own_run.path)
    for table in place.rglob("files.json"):
        table.unlink()
    with pytest.raises(UserError, match="holds no whole checkpoint of the run"):
        restore(job, lines.append)
    assert not own_run.path.exists()


def test_a_fresh_run_of_a_mirrored_name_is_refused(own_run, job, mirror, lines):
    mirror.sync()
    shutil.rmtree(own_run.path)
    never = replace(job, run=replace(job.run, resume="never"))
    with pytest.raises(UserError, match="holds a run of this name already"):
        restore(never, lines.append)
    assert not own_run.path.exists()


def test_a_name_that_leads_out_is_refused(own_run, job, mirror, lines, monkeypatch):
    mirror.sync()
    shutil.rmtree(own_run.path)
    names = Folder.list(Folder(f"{job.checkpoint.mirror}/{job.run.name}"))
    monkeypatch.setattr(Folder, "list", lambda f: {**names, "../../outside": 3})
    with pytest.raises(UserError, match="it is no mirror"):
        restore(job, lines.append)
    assert not own_run.path.exists()


def test_an_attempt_that_was_half_sent_does_not_count(own_run, job, lines, place):
    """After a rollback: a kill between its rows and its parent."""
    attempt = own_run.new_attempt()
    attempt.start_from(Parent(4, "checkpoints/step-00000004"), own_run)
    attempt.metrics.add(train_row(attempt, 5))
    mirror_of(own_run, job, lines.append).sync()
    (place / own_run.name / "attempts/0002/parent.json").unlink()
    shutil.rmtree(own_run.path)
    restore(job, lines.append)
    assert own_run.checkpoint_steps() == [8]
    assert not check_run(own_run).faults
    mirror_of(own_run, job, lines.append).check()
    assert own_run.new_attempt().number == 3


ODD = ["checkpoints/step-abc/files.json", "checkpoints/step-00000012.bak/files.json"]
ODD += ["checkpoints/step-12/files.json", "checkpoints/step-00000008/code.py"]
ODD += ["jobs/0001/job.sbatch", "callbacks.py", "attempts/0001/.launch.json.17.tmp"]


def test_only_what_a_mirror_has_is_brought(own_run, job, mirror, lines, place):
    """Others may have put copies beside it, or programs into it."""
    mirror.sync()
    shutil.rmtree(own_run.path)
    for odd in ODD:
        path = place / own_run.name / odd
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    restore(job, lines.append)
    assert own_run.checkpoint_steps() == [8]
    assert not [odd for odd in ODD if (own_run.path / odd).exists()]


def test_directories_that_a_purge_has_left_are_no_run(own_run, job, mirror, lines):
    mirror.sync()
    files = [p for p in own_run.path.rglob("*") if p.is_symlink() or p.is_file()]
    last = own_run.identity
    for path in files:
        if path != last:
            path.unlink()
    with pytest.raises(UserError, match=r"but other files, such as run\.json; move it"):
        restore(job, lines.append)
    last.unlink()
    restore(job, lines.append)
    assert own_run.checkpoint_steps() == [8]


def test_of_two_commands_that_restore_at_once_one_does(own_run, job, mirror, lines, monkeypatch):
    mirror.sync()
    aside, get = own_run.path.rename(own_run.path.with_name("aside")), Folder.get

    def get_late(folder, name):
        if not own_run.path.exists():
            shutil.copytree(aside, own_run.path, symlinks=True)
            own_run.new_attempt()
        return get(folder, name)

    monkeypatch.setattr(Folder, "get", get_late)
    with pytest.raises(UserError, match="another command has made this run at the same moment"):
        restore(job, lines.append)
    assert contents(own_run.path) == contents(aside)
    assert [attempt.number for attempt in own_run.attempts()] == [1, 2]


def test_a_restored_run_begins_a_submission_of_its_own(own_run, job, lines, place):
    """Not with the crashes and the faulty nodes of the one before."""
    write_json(own_run.attempts()[0].path / "launch.json", {"slurm": {"submission": "0003"}})
    mirror_of(own_run, job, lines.append).sync()
    shutil.rmtree(own_run.path)
    restore(job, lines.append)
    folder = own_run.new_job()
    assert folder.name == "0004"
    _refuse_second(own_run, folder)  # nobody else submits it now
