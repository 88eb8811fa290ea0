"""Attempt after attempt: when the launcher goes on, and when it leaves a run to another one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from forescale.config.train import TrainJob
from forescale.errors import CRASHED, DONE, UserError
from forescale.resilience import launcher
from forescale.resilience.outcome import begin
from forescale.run.directory import Run
from forescale.verbs import train


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

        monkeypatch.setattr(launcher, "start_ranks", start_ranks)
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


def test_a_frozen_run_is_what_its_directory_says(own_run, tmp_path):
    """Wherever it was moved; what a job in a queue goes by."""
    from forescale.config.frozen import thaw
    from forescale.verbs.train import _frozen

    moved = tmp_path / "elsewhere" / "other"
    moved.parent.mkdir()
    own_run.path.rename(moved)
    job = _frozen([str(moved), "--frozen"])
    assert (job.run.name, job.run.root) == ("other", str(moved.parent))
    stored = thaw(TrainJob, moved / "config.yaml")
    assert replace(job, run=stored.run) == stored


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("runs/small", "train.steps=9", "--frozen"), "is not one run"),
        (("--frozen",), "is not one run"),
        (("nowhere", "--frozen"), "no run of this name or path"),
    ],
)
def test_frozen_takes_a_run_and_nothing_else(own_run, forescale, words, said):
    code, _, err = forescale("train", *words)
    assert code == 2
    assert said in err


def test_a_frozen_class_of_the_users_needs_trust(own_run, forescale):
    config = own_run.config.read_text()
    head, _, rest = config.partition("model:\n")
    rest = rest[rest.index("\ndata:") :]
    own_run.config.write_text(f"{head}model:\n  _target_: somewhere.Net{rest}")
    code, _, err = forescale("train", "runs/small", "--frozen")
    assert code == 2
    assert "give trust=true if you trust the file" in err
