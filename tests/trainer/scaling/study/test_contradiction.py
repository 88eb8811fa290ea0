"""A stage whose runs contradict their forecasts is said, asked about, and stops the launch."""

import math
import os
import sys
from types import SimpleNamespace

import pytest

from forescale import cli
from forescale.ground.errors import UserError
from forescale.scaling.config import LaunchKeys
from forescale.scaling.study import contradiction as module
from forescale.scaling.study import launching
from forescale.scaling.study.contradiction import Judgement, ask_if_contradicted, judgement
from forescale.scaling.study.directory import Study
from tests.trainer.scaling.fake_training import FakeTraining

LOSSES = {"a": 2.0, "b": 2.0, "c": 2.0}


class Fake(SimpleNamespace):
    def states(self):
        return [state(name, loss) for name, loss in self.losses.items()]

    def event(self, kind, **facts):
        self.events.append({"kind": kind, **facts})


def state(name, loss, status="complete"):
    cell = SimpleNamespace(name=name, stage=3, role="rate" if "-" in name else "grid",
                           cell_of=name.partition("-")[0])  # fmt: skip
    return SimpleNamespace(cell=cell, loss=loss, status=status, has_ended=True)


@pytest.fixture
def study(monkeypatch):
    """A study whose third stage was predicted at 2, with 90 % intervals of 4 %."""
    forecasts = [
        SimpleNamespace(facts={"target": {"run": name}, "loss": 2.0, "level": 0.9,
                               "interval": [2 / 1.04, 2 * 1.04]})
        for name in LOSSES
    ]  # fmt: skip
    monkeypatch.setattr(module, "read_forecasts", lambda folder: forecasts)
    cells = tuple(state(name, 0.0).cell for name in LOSSES)
    stage = SimpleNamespace(number=3, exact=True, cells=cells)
    return Fake(losses=dict(LOSSES), plan=SimpleNamespace(stages=[stage]), events=[], forecasts="",
                folder=SimpleNamespace(name="mine"))  # fmt: skip


def questions_of(study, answer=True) -> tuple[list[str], list[str]]:
    """The questions and the lines of the log."""
    questions, lines = [], []
    ask_if_contradicted(study, study.plan.stages[0], lambda q: questions.append(q) or answer,
                        lines.append)  # fmt: skip
    return questions, lines


@pytest.mark.parametrize(
    ("errors", "contradicted"),
    [
        ((0.01, -0.02, 0.03), False),
        ((0.05, 0.0, 0.0), False),  # one of ten is outside by chance
        ((0.05, -0.05, 0.0), True),
        ((0.042, 0.039, 0.042), True),
        ((0.05,), True),
    ],
)
def test_two_runs_outside_or_all_off_together_contradict(errors, contradicted):
    assert Judgement(errors, (0.04,) * len(errors), 0.9).is_contradicted == contradicted


def test_the_best_rate_of_a_size_counts_and_failed_runs_do_not(study):
    study.losses |= {"a": 2.5, "a-low": 2.01, "b-high": 9.0}
    study.losses["c"] = None
    judged = judgement(study, study.plan.stages[0])
    assert judged.errors == (math.log(2.01 / 2), 0.0)
    assert judged.halves == pytest.approx((math.log(1.04),) * 2)


def test_who_goes_on_is_warned_and_asked_once(study):
    study.losses |= {"a": 2.2, "b": 2.2}
    questions, (line,) = questions_of(study)
    assert questions == ["Go on with the next stage?"]
    assert "stage 3 contradicts its forecasts: 2 of 3 runs are outside their 90% interval" in line
    assert "6.6% higher than predicted on average" in line
    assert questions_of(study) == ([], [])


def test_who_stops_is_asked_again_by_the_next_launch(study):
    study.losses |= {"a": 1.8, "b": 1.8}
    for _ in range(2):
        with pytest.raises(UserError, match=r"lower than predicted.*launch.contradiction=continue"):
            questions_of(study, False)


def test_nothing_is_said_of_good_forecasts_or_once_a_later_stage_is_decided(study):
    assert questions_of(study) == ([], [])
    study.losses |= {"a": 2.2, "b": 2.2}
    study.plan.stages.append(SimpleNamespace(number=4, exact=True))
    assert questions_of(study) == ([], [])


@pytest.mark.parametrize(
    ("key", "typed", "goes_on"),
    [("continue", None, True), ("stop", None, False), ("ask", None, True), ("ask", "y\n", True),
     ("ask", "\n", False)],
)  # fmt: skip
def test_the_key_answers_or_who_sits_at_the_terminal(monkeypatch, key, typed, goes_on):
    """typed: what is typed at the terminal; None: there is none."""
    keyboard, terminal = os.openpty()
    with open(terminal) if typed else open(os.devnull) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        if typed:
            os.write(keyboard, typed.encode())
        keys = LaunchKeys(contradiction=key)
        launcher = SimpleNamespace(keys=keys, stop_signal=None, log=lambda line: None)
        assert launching.Launcher._goes_on(launcher, "Go on?") == goes_on


def test_a_stop_signal_ends_the_question(monkeypatch):
    _, terminal = os.openpty()
    with open(terminal) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        launcher = SimpleNamespace(keys=LaunchKeys(), stop_signal=None)
        launcher.log = lambda line: setattr(launcher, "stop_signal", 2)
        assert not launching.Launcher._goes_on(launcher, "Go on?")


@pytest.mark.slow  # plans, fits and forecasts a study of three budgets
def test_a_launch_stops_before_the_target_and_goes_on_when_told(
    small_data, tmp_path, fake_training, capsys, monkeypatch
):
    where = [f"studies={tmp_path}", "study=odd"]
    plan = ["plan.budgets=3", "plan.sizes=3", "plan.cap=1e14", "plan.sequence_length=32",
            "target.flops=4e13", "near=null", "bootstraps=100"]  # fmt: skip
    shared = ["--", f"data.path={small_data}", "optimizer=adamw", "validation.every=100 %"]
    assert cli.main(["study", "plan", *where, *plan, *shared]) == 0
    cells = [c.name for c in Study(tmp_path / "odd").plan.cells if c.stage == 3]
    monkeypatch.setattr(FakeTraining, "losses", dict.fromkeys(cells, 5.0))
    launch = ["study", "launch", *where, "launch.target=true"]
    for _ in range(2):
        assert cli.main([*launch, "launch.contradiction=stop"]) == 2
        assert "stage 3 of" in capsys.readouterr().err
    study = Study(tmp_path / "odd")
    assert all(s.has_ended for s in study.states())
    assert all(c.role != "target" for c in study.plan.cells)
    assert cli.main(launch) == 0, "without a terminal it goes on"
    assert "Warning: stage 3 contradicts its forecasts" in capsys.readouterr().out
    assert any(c.role == "target" for c in Study(tmp_path / "odd").plan.cells)
