"""The drill judges what runs leave behind: made-up runs here, the whole drill once (slow)."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from forescale.config.compose import compose
from forescale.config.sections.faults import KINDS, problems, read
from forescale.config.train import TrainJob
from forescale.drill import runner
from forescale.drill.judge import Command, Evidence, Line, judge
from forescale.drill.runner import Drill
from forescale.drill.scenarios import BASE, BY_NAME, SCENARIOS, STEPS, Scenario
from forescale.ground.errors import UserError
from forescale.run.directory import Parent, Run

BEGIN = 1000.0  # when the made-up commands start; a step takes a second
KILL = Scenario("kill", "a rank is killed", ("kill@6",), "^rank 0 ended with", "the launcher")


def row(step: int, attempt: int = 1, **changed) -> dict:
    fields = {
        "kind": "train",
        "step": step,
        "attempt": attempt,
        "g0": 8 * step - 8,
        "g1": 8 * step,
        "tokens": 256 * step,
        "tokens_hash": 977 * step,
        "loss": 5.0 - step / 7,
        "grad_norm": 1.0 + step / 3,
        "applied": True,
        "seconds": {"compute": 0.5, "data": 0.1},
    }
    return {**fields, **changed}


def line(step: int, time: float) -> Line:
    return Line(time, f"step {step:>2}/10 ({step:.0%}) | loss 4.2 | eta 00:01")


def make(path: Path, *attempts: tuple[Parent, list[dict]]) -> Run:
    """A run of so many attempts: what each started from, and the rows that it added."""
    run = Run(path)
    for parent, rows in attempts:
        attempt = run.new_attempt()
        attempt.start_from(parent, run)
        for one in rows:
            attempt.metrics.add({**one, "attempt": attempt.number})
    return run


def strike(run: Run, fault: str, time: float, attempt: int = 0) -> None:
    path = run.attempts()[attempt].path / f"faults-rank-{read(fault).rank}.jsonl"
    path.write_text(json.dumps({"fault": str(read(fault)), "time": time, "at": "forward"}) + "\n")


def command(code: int | None, output: list[Line], began: float = BEGIN, seconds: float = 30.0):
    return Command(code, began, began + seconds, output)


def rows(*steps: int, **changed) -> list[dict]:
    return [row(step, **changed) for step in steps]


@pytest.fixture
def undisturbed(tmp_path) -> Evidence:
    run = make(tmp_path / "undisturbed", (Parent(0), rows(*range(1, 11))))
    return Evidence(run, [command(0, [line(s, BEGIN + s) for s in range(1, 11)])])


def killed(path: Path, second=None, code: int = 0, message: str = "rank 0 ended with SIGKILL"):
    """Killed while it makes step 6, ten seconds later there again, from the checkpoint at 3."""
    after = rows(*range(4, 11)) if second is None else second
    run = make(path / "killed", (Parent(0), rows(*range(1, 6))), (Parent(3, "c"), after))
    strike(run, "kill@6", BEGIN + 5.5)
    output = [line(s, BEGIN + s) for s in range(1, 6)] + [Line(BEGIN + 5.75, message)]
    output += [line(s, BEGIN + 12 + s) for s in range(4, 11)]
    return Evidence(run, [command(code, output)])


def no_fresh(skipped):
    raise AssertionError("no other run is needed")


def test_a_run_that_repeats_every_bit_has_survived(tmp_path, undisturbed):
    verdict = judge(KILL, killed(tmp_path), undisturbed, no_fresh)
    assert verdict.survived
    assert verdict.steps == 2  # 4 and 5 were made twice
    assert verdict.noticed == pytest.approx(0.25)
    assert verdict.by == "the launcher"
    # From 5.5 to the last step at 22 it took 16.5 s; undisturbed it is 4 from step 6 on.
    assert verdict.seconds == pytest.approx(12.5)
    assert verdict.compute == pytest.approx(5.0)  # of ten steps that count
    assert verdict.wall == pytest.approx(30.0)
    assert str(verdict) == "survived: 2 steps and 12.5 s lost; the launcher noticed after 0.25 s."


@pytest.mark.parametrize("key", ["loss", "grad_norm", "tokens_hash", "g0", "tokens"])
def test_a_row_that_differs_in_the_last_digit_is_not_survived(tmp_path, undisturbed, key):
    second = rows(*range(4, 11))
    value = second[4][key]
    second[4][key] = math.nextafter(value, 9.9) if isinstance(value, float) else value + 1
    verdict = judge(KILL, killed(tmp_path, second), undisturbed, no_fresh)
    assert not verdict.survived
    assert f"{key} of step 8" in str(verdict)


def test_steps_that_are_missing_are_not_survived(tmp_path, undisturbed):
    verdict = judge(KILL, killed(tmp_path, rows(*range(4, 10))), undisturbed, no_fresh)
    assert "9 steps count instead of 10" in str(verdict)


@pytest.mark.parametrize(
    ("code", "says"), [(76, "ended with code 76 instead of 0"), (None, "still ran after 30 s")]
)
def test_a_wrong_end_is_not_survived(tmp_path, undisturbed, code, says):
    verdict = judge(KILL, killed(tmp_path, code=code), undisturbed, no_fresh)
    assert says in str(verdict)


def test_a_fault_that_nobody_notices_is_not_survived(tmp_path, undisturbed):
    verdict = judge(KILL, killed(tmp_path, message="all is well"), undisturbed, no_fresh)
    assert verdict.wrong == ["no fault was noticed"]
    assert verdict.noticed is None


def test_what_was_said_before_the_fault_notices_nothing(tmp_path, undisturbed):
    evidence = killed(tmp_path)
    strike(evidence.run, "kill@6", BEGIN + 5.8)
    assert judge(KILL, evidence, undisturbed, no_fresh).wrong == ["no fault was noticed"]


def test_a_fault_that_never_struck_proves_nothing(tmp_path, undisturbed):
    evidence = killed(tmp_path)
    (evidence.run.attempts()[0].path / "faults-rank-0.jsonl").unlink()
    assert "kill@6:rank0 happened 0 times" in str(judge(KILL, evidence, undisturbed, no_fresh))
    strike(evidence.run, "kill@6", BEGIN + 1, attempt=0)
    strike(evidence.run, "kill@6", BEGIN + 2, attempt=1)
    assert "kill@6:rank0 happened 2 times" in str(judge(KILL, evidence, undisturbed, no_fresh))


def test_an_event_notices_too(tmp_path, undisturbed):
    evidence = killed(tmp_path)
    evidence.run.attempts()[1].events.add({"kind": "straggler", "time": BEGIN + 9.5, "rank": 1})
    scenario = replace(KILL, noticed='^straggler .*"rank": 1', by="the watchdog")
    verdict = judge(scenario, evidence, undisturbed, no_fresh)
    assert verdict.noticed == pytest.approx(4.0)


DISK = Scenario("disk", "full", ("enospc@6",), "the disk is full", "the write", codes=(2, 0))
SENTENCE = "forescale: rank-00000.safetensors: the disk is full; free some space."


def full(path: Path, *lines: str, torn=()) -> Evidence:
    run = make(
        path / "full", (Parent(0), rows(*range(1, 8))), (Parent(3, "c"), rows(*range(4, 11)))
    )
    strike(run, "enospc@6", BEGIN + 6)
    first = Command(2, BEGIN, BEGIN + 9, [Line(BEGIN + 7, text) for text in lines], torn)
    return Evidence(run, [first, command(0, [], BEGIN + 9)])


def test_a_full_disk_needs_one_sentence(tmp_path, undisturbed):
    assert judge(DISK, full(tmp_path, SENTENCE), undisturbed, no_fresh).survived


@pytest.mark.parametrize(
    ("lines", "torn", "says"),
    [
        ((SENTENCE, "Traceback (most recent call last):"), (), "a traceback"),
        ((), (), "did not print exactly one error message"),
        ((SENTENCE, SENTENCE), (), "did not print exactly one error message"),
        ((SENTENCE,), ("step-00000003/state.json: missing",), "left a damaged checkpoint (step-"),
    ],
)
def test_and_no_more_than_that(tmp_path, undisturbed, lines, torn, says):
    assert says in str(judge(DISK, full(tmp_path, *lines, torn=torn), undisturbed, no_fresh))


NAN = replace(KILL, name="nan", faults=("nan@6",), noticed="^update_dropped", rows="skipped")


def skipped(path: Path, **changed) -> Evidence:
    all_rows = rows(*range(1, 11))
    all_rows[5] |= {"grad_norm": math.nan, "applied": False}
    for one in all_rows[6:]:
        one["loss"] += 0.01  # what is learnt later differs
    all_rows[changed.pop("at", 7)] |= changed
    run = make(path / "nan", (Parent(0), all_rows))
    strike(run, "nan@6", BEGIN + 6)
    run.attempts()[0].events.add({"kind": "update_dropped", "time": BEGIN + 7, "step": 6})
    return Evidence(run, [command(0, [line(s, BEGIN + s) for s in range(1, 11)])])


def test_after_a_skip_the_same_data_is_read(tmp_path, undisturbed):
    verdict = judge(NAN, skipped(tmp_path), undisturbed, no_fresh)
    assert verdict.survived
    assert (verdict.steps, verdict.seconds) == (0, 0.0)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"tokens_hash": 1}, "tokens_hash of step 8"),
        ({"applied": False}, "the update of step 8 was dropped"),
        ({"at": 5, "applied": True}, "the update of step 6 was not dropped"),
        ({"at": 5, "loss": 1.0}, "loss of step 6"),
        ({"at": 3, "loss": 1.0}, "loss of step 4"),
        ({"loss": math.nan}, "step 8 is not finite"),
    ],
)
def test_and_nothing_else_changes(tmp_path, undisturbed, changed, says):
    assert says in str(judge(NAN, skipped(tmp_path, **changed), undisturbed, no_fresh))


def test_a_rollback_is_compared_with_a_run_that_never_read_the_samples(tmp_path, undisturbed):
    scenario = replace(KILL, faults=("spike@6",), noticed="^rollback", rows="rolled back")
    parent = Parent(3, "c", ((40, 48),), 6)
    other = rows(*range(1, 6)) + [row(s, g1=8 * s + 8) for s in range(6, 11)]
    run = make(tmp_path / "back", (Parent(0), rows(*range(1, 6))), (parent, other[3:]))
    strike(run, "spike@6", BEGIN + 6)
    run.attempts()[0].events.add({"kind": "rollback", "time": BEGIN + 6.5, "step": 6})
    evidence, requests = Evidence(run, [command(0, [])]), []

    def fresh(intervals):
        requests.append(intervals)
        return Evidence(make(tmp_path / "fresh", (Parent(0), other)), [command(0, [])])

    assert judge(scenario, evidence, undisturbed, fresh).survived
    assert requests == [((40, 48),)]
    assert not judge(scenario, evidence, undisturbed, lambda i: undisturbed).survived
    nothing = Evidence(make(tmp_path / "no", (Parent(0), rows(*range(1, 11)))), [command(0, [])])
    strike(nothing.run, "spike@6", BEGIN)
    assert "it skipped no samples" in str(judge(scenario, nothing, undisturbed, fresh))


def test_scenarios_ask_for_what_there_is(dataset):
    """Every row composes, with its faults, on two ranks."""
    assert set(KINDS) == {read(text).kind for s in SCENARIOS for text in s.faults}
    for scenario in SCENARIOS:
        assert not problems(scenario.faults, 2, STEPS)
        overrides = (*BASE, "launch.processes=2", *scenario.settings, *scenario.overrides)
        faults = f"faults=[{','.join(scenario.faults)}]"
        job = compose(TrainJob, [*overrides, f"data.path={dataset}", faults])
        assert job.faults == list(scenario.faults)
    assert len(BY_NAME) == len(SCENARIOS)


def test_a_choice_that_is_no_scenario_is_a_sentence(forescale):
    code, out, err = forescale("drill", "scenarios=[kil,freeze-data,slo]", "limit=5")
    assert (code, out) == (2, "")
    assert "'kil' is not a scenario; choose some of kill" in err
    assert "'slo' is not a scenario; choose some of slow" in err
    assert "limit: must be a wall time" in err


def test_a_directory_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="is not empty"):
        Drill(tmp_path, 2, 10.0)


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """A drill whose commands are Python scripts instead of training: stubbed(script)."""
    monkeypatch.setattr(runner, "build_dataset", lambda _, output, __: output.mkdir(parents=True))
    drill = Drill(tmp_path / "drill", 2, limit=20.0)

    def give(script: str) -> Drill:
        command = [sys.executable, "-c", script]
        monkeypatch.setattr(drill, "_command", lambda n, o: (Run(tmp_path / n), command))
        return drill

    return give


def test_lines_are_heard_when_they_are_said(stubbed):
    drill = stubbed("import time; print('one'); time.sleep(1); print('two'); raise SystemExit(3)")
    run, command = drill._command("x", ())
    finished = drill._run(command, run, "x")
    assert finished.code == 3
    assert [line.text for line in finished.lines] == ["one", "two"]
    assert finished.lines[1].time - finished.lines[0].time > 0.9
    assert "two" in (drill.directory / "x.log").read_text()


def test_a_command_that_hangs_is_ended(stubbed):
    drill = stubbed("import time; print('on'); time.sleep(1000)")
    drill.limit = 1.0
    run, command = drill._command("x", ())
    finished = drill._run(command, run, "x")
    assert finished.code is None
    assert finished.seconds < 20


def test_an_undisturbed_run_that_fails_is_told(stubbed):
    with pytest.raises(UserError, match="ended with code 5"):
        stubbed("raise SystemExit(5)").undisturbed()


# In tests/distributed: test_hangs.py, test_saves.py, test_poison.py, test_selfcheck.py and
# test_places.py have the like of them. A rank is killed in "damage", too.
ELSEWHERE = {"kill", "freeze-data", "freeze-norm", "hang", "crash", "slow"}
ELSEWHERE |= {"kill-save", "spike-rollback", "flip", "disk"}
CHOSEN = [s.name for s in SCENARIOS if os.environ.get("FORESCALE_DRILL") or s.name not in ELSEWHERE]


@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_the_drill(tmp_path):
    """FORESCALE_DRILL=all takes all scenarios."""
    results = tmp_path / "drill.json"
    words = [f"scenarios=[{','.join(CHOSEN)}]", f"to={tmp_path / 'drill'}", f"json={results}"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "forescale", "drill", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(results.read_text())
    assert [s["name"] for s in report["scenarios"]] == CHOSEN
    assert all(s["survived"] for s in report["scenarios"])
    assert f"{len(CHOSEN)} of {len(CHOSEN)} survived" in done.stdout
