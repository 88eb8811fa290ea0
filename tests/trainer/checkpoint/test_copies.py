"""What is of another run, or of another copy of this one, is never overwritten in a mirror."""

import shutil

import pytest

from forescale.checkpoint.copies import Taken
from forescale.checkpoint.mirror import Mirror, mirror_of
from forescale.checkpoint.retention import Keep
from forescale.ground.errors import UserError
from forescale.ground.storage import read_json, write_checked_json, write_json
from forescale.remote.buckets import Folder
from forescale.run.directory import Parent, Run
from tests.trainer.checkpoint.mirrored import contents, mirror_job
from tests.trainer.small_run import train_row


def test_a_mirror_that_is_ahead_is_not_overwritten(own_run, job, mirror, place, lines):
    """The run was restored and trained elsewhere; then somebody starts the old directory."""
    mirror.sync()
    elsewhere = own_run.path.with_name("elsewhere")
    shutil.copytree(own_run.path, elsewhere, symlinks=True)
    other = Run(elsewhere)
    other.new_attempt().start_from(Parent(8, "checkpoints/step-00000008"), other)
    ahead = Mirror(other, Folder(f"{place}/{own_run.name}"), Keep(), lines.append)
    ahead.close()
    old = mirror_of(own_run, job, lines.append)
    with pytest.raises(Taken, match="holds attempt 0002"):
        old.check()
    before = contents(place)
    # Both had been started before either began an attempt.
    own_run.new_attempt().start_from(Parent(8, "checkpoints/step-00000008"), own_run)
    with pytest.raises(Taken, match="got attempt 0002"):
        mirror._send_run()
    assert contents(place) == before


def test_an_attempt_of_the_same_number_from_elsewhere_is_not_overwritten(
    own_run, job, lines, place
):
    launch = own_run.attempts()[0].path / "launch.json"
    write_json(launch, {"begun": 1.0})
    mirror_of(own_run, job, lines.append).sync()
    write_json(launch, {"begun": 1.0, "code": 0})  # it has ended meanwhile
    mirror_of(own_run, job, lines.append).check()
    write_json(launch, {"begun": 2.0})
    before = contents(place)
    with pytest.raises(Taken, match="holds attempt 0001 of small, which isn't the one in"):
        mirror_of(own_run, job, lines.append).check()
    assert contents(place) == before


@pytest.mark.parametrize("launched", ["here", "there", "nowhere"])
def test_an_attempt_that_torchrun_began_elsewhere_is_not_overwritten(
    own_run, job, lines, place, launched
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
    mirror_of(other, job, lines.append).close()
    mirror_of(other, job, lines.append).check()
    before = contents(place)
    with pytest.raises(Taken, match="holds attempt 0002"):
        mirror_of(own_run, job, lines.append).check()
    assert contents(place) == before


def test_another_run_of_the_same_name_is_not_overwritten(own_run, job, mirror, lines, place):
    mirror.sync()
    before = contents(place)
    identity = read_json(own_run.identity)
    write_checked_json(own_run.identity, {**identity, "wandb_id": "other"})
    with pytest.raises(Taken, match="holds another run of the name small"):
        mirror_of(own_run, job, lines.append).check()
    assert contents(place) == before


def test_a_run_is_no_mirror_of_itself(own_run, lines):
    job = mirror_job(own_run, own_run.path.parent)
    with pytest.raises(UserError, match="is the run itself, not a copy of it"):
        mirror_of(own_run, job, lines.append).check()
