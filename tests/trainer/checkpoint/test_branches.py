"""What a branch begins with stays at its origin."""

from types import SimpleNamespace

import pytest

from forescale.checkpoint import retention
from forescale.checkpoint.choice import newest_step
from forescale.checkpoint.retention import hold
from forescale.ground.errors import UserError
from forescale.run.directory import Parent, Run


def test_the_newest_step_is_that_of_an_eligible_readable_checkpoint(own_run):
    assert newest_step(own_run) == 8
    (own_run.checkpoint_path(8) / "state.json").write_text("{")
    assert newest_step(own_run) == 4
    own_run.new_attempt().start_from(Parent(2), own_run)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        newest_step(own_run)


def branched(step):
    return SimpleNamespace(run="small", step=step)


def test_what_a_branch_came_from_is_kept(own_run):
    for _ in range(2):
        assert hold(Run("runs/branch"), branched(4), "runs") == []
    assert retention.is_pinned(own_run, 4)
    checkpoints = retention.survey(own_run, {})
    assert retention.reasons(checkpoints, retention.Keep(newest=1)) == {
        4: "pinned",
        8: "one of the newest 1",
    }
    with pytest.raises(UserError, match="no such checkpoint"):
        hold(Run("runs/branch"), branched(5), "runs")


def test_a_branch_with_a_checkpoint_of_its_own_needs_its_origin_no_more(own_run):
    assert hold(own_run, branched(4), "nowhere") == []
    assert not retention.is_pinned(own_run, 4)


def test_an_origin_that_is_not_ours_is_only_said(own_run, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(retention, "write_file", refused)
    (note,) = hold(Run("runs/branch"), branched(4), "runs")
    assert "can't be pinned (Permission denied); it may be deleted" in note
