"""Attempt after attempt: when the launcher goes on, and when it leaves a run to another one."""

from types import SimpleNamespace

import pytest

from trainer import launch
from trainer.config import TrainJob
from trainer.ending import begin
from trainer.errors import CRASHED, DONE, UserError
from trainer.run import Run
from trainer.verbs import train


@pytest.fixture
def launches(tmp_path, monkeypatch):
    """launches(*ways): the launcher on an empty run; each way is what its ranks do, (code, path of
    the attempt -> None). Returns the code that it ends with and its attempts."""
    run = Run(tmp_path / "run")
    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)

    def go(*ways):
        todo, attempts = list(ways), []

        def start_ranks(command, processes, attempt, tell, grace):
            attempts.append(int(attempt.name))
            begin(attempt, command, processes)
            code, act = todo.pop(0)
            act(run)
            return code

        monkeypatch.setattr(launch, "start_ranks", start_ranks)
        return train._keep_going(SimpleNamespace(run=run, job=TrainJob()), [], 1), attempts

    return go


def nothing(run):
    pass


def roll_back(run):
    run.new_attempt()


def be_overtaken(run):
    begin(run.new_attempt().path, ["forescale", "train"], 2)


def test_a_crash_is_followed_by_another_attempt(launches):
    assert launches((CRASHED, nothing), (DONE, nothing)) == (DONE, [1, 2])


def test_an_attempt_that_the_ranks_began_to_roll_back_is_their_launchers_own(launches):
    assert launches((CRASHED, roll_back), (DONE, nothing)) == (DONE, [1, 3])


def test_a_launcher_that_was_overtaken_leaves_the_run_to_the_newer_one(launches):
    with pytest.raises(UserError, match="attempt 2 was started elsewhere meanwhile"):
        launches((CRASHED, be_overtaken), (DONE, nothing))
