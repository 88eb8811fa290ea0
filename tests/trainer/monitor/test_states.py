"""The state of a run as its files tell it: running, dead, complete, and how attempts ended."""

import json
import re
import shutil

import pytest

from forescale import open_run
from forescale.monitor.follow import Memory
from forescale.monitor.status import Status
from forescale.resilience.diagnosis import Hang, publish_hang
from forescale.run.directory import Parent
from tests.trainer.monitor.changed_run import age_by, changed_rows, say_how_it_went
from tests.trainer.small_run import STEPS, save


def test_states(unfinished):
    assert Status(unfinished).state == "running"
    age_by(unfinished, 3600)
    assert Status(unfinished).state == "crashed"  # steps 5 and 6 are in no checkpoint
    model = open_run(unfinished.path).model(4)
    save(unfinished, unfinished.attempts()[-1], 6, model)
    age_by(unfinished, 3600)
    assert Status(unfinished).state == "interrupted"


def test_times_to_come_are_no_signs_of_life(unfinished, forescale):
    """The clock was years ahead, and was put right."""
    age_by(unfinished, -3e8)
    assert Status(unfinished).state == "crashed"
    for words in (("status", "small"), ("status",)):
        assert not re.search(r"\s-\d", forescale.prints(*words))
    unfinished.attempts()[-1].metrics.add({"kind": "note"})
    assert Status(unfinished).state == "running"
    age_by(unfinished, -120)  # of a file server that is a little ahead
    assert Status(unfinished).state == "running"


def test_a_slow_run_is_running_for_longer(unfinished):
    age_by(unfinished, 300)
    assert Status(unfinished).state == "crashed"
    with changed_rows(unfinished) as rows:
        rows[-1]["seconds"]["evaluation"] = 200.0
    age_by(unfinished, 300)
    assert Status(unfinished).state == "running"
    (unfinished.attempts()[-1].path / "rank-0.log").write_text("")
    age_by(unfinished, 300)
    assert Status(unfinished).state == "running"
    age_by(unfinished, 1e5)
    assert Status(unfinished).state == "crashed"


def test_no_row_is_read_of_a_run_that_was_dead_for_longer_than_it_lived(unfinished, monkeypatch):
    age_by(unfinished, 3600)
    monkeypatch.setattr(Memory, "ledger", lambda self, path, attempt=None: pytest.fail("all rows"))
    assert Status(unfinished).state == "crashed"


def test_a_run_that_no_attempt_was_made_of_is_new(own_run):
    shutil.rmtree(own_run.path / "attempts")
    shutil.rmtree(own_run.checkpoints)
    for link in (own_run.metrics, own_run.events):
        link.unlink()
    status = Status(own_run)
    assert (status.state, status.step, status.validation) == ("new", 0, None)


def test_what_was_lost_and_what_does_not_count(unfinished, forescale):
    status = Status(unfinished)
    assert status.step == 6
    lost = status.lost()
    assert (lost.steps, lost.seconds) == (STEPS - 4, 2.0 * (STEPS - 4))
    buckets = {k: status.goodput.buckets[k] for k in ("data", "compute", "lost")}
    assert buckets == pytest.approx({"data": 3.0, "compute": 9.0, "lost": 8.0}, abs=1.0)
    code, out, _ = forescale("status", "small")
    assert code == 0
    assert "; lost 4 steps" in out
    assert re.search(r"^ +8 +1,024 .* no ", out, re.MULTILINE)
    assert re.search(r"^ +2 +step 4 ", out, re.MULTILINE)


def test_a_run_whose_launcher_saw_it_end_is_not_running(unfinished, forescale):
    say_how_it_went(unfinished.attempts()[-1], 1, "rank 1 ended with ValueError: too wide")
    assert Status(unfinished).state == "crashed"
    _, out, _ = forescale("status", "small")
    assert re.search(r"^ +2 +step 4 .* crash *$", out, re.MULTILINE)
    assert "Attempt 2 ended: rank 1 ended with ValueError: too wide." in out


def test_a_run_that_its_guard_halted_is_halted_and_says_why(unfinished, forescale):
    attempt = unfinished.attempts()[-1]
    attempt.event("halt", step=6, reason="the loss is NaN", loss=None, grad_norm=1.0)
    attempt.event("ended", step=6, reason="halted", seconds={"closing": 0.1})
    say_how_it_went(attempt, 2, "small, step 6: halted: the loss is NaN; look at the events.")
    status = Status(unfinished)
    assert (status.state, status.seconds_left) == ("halted", None)
    for words in (("status", "small"), ("status",)):
        out = forescale.prints(*words)
        assert "The guard halted it at step 6: the loss is NaN." in out
        assert not re.search("interrupted|refused", out)
    facts = json.loads(forescale.prints("status", "small", "--json"))
    assert facts["error"] == "The guard halted it at step 6: the loss is NaN."


def test_a_run_with_wrong_input_is_refused_with_its_sentence(unfinished, forescale):
    sentence = "data: the dataset is damaged (train-000000.tar); restore it"
    say_how_it_went(unfinished.attempts()[-1], 2, f"{sentence}.")
    assert (Status(unfinished).state, Status(unfinished).seconds_left) == ("refused", None)
    out = forescale.prints("status", "small")
    assert f"It was refused: {sentence}." in out
    assert "crash" not in out
    assert sentence in forescale.prints("status")


def test_a_run_that_does_not_run_has_no_end_in_sight(unfinished, forescale):
    assert Status(unfinished).seconds_left is not None
    unfinished.attempts()[-1].event("ended", step=6, reason="interrupted", seconds={})
    assert (Status(unfinished).state, Status(unfinished).seconds_left) == ("interrupted", None)


def test_a_rollback_is_part_of_its_launch(unfinished):
    number = unfinished.attempts()[-1].number
    again = unfinished.new_attempt()
    again.start_from(
        Parent(4, str(unfinished.checkpoint_path(4)), ((20, 24),), rolled_back_from=6), unfinished
    )
    assert Status(unfinished).state == "running"
    say_how_it_went(unfinished.attempts()[number - 1], 1)
    assert Status(unfinished).state == "interrupted", "all that counts is saved"


def test_a_hang_is_said(unfinished, forescale):
    attempt = unfinished.attempts()[-1]
    publish_hang(
        attempt.path, Hang((1,), "n7", "data", 6, 12.0, "rank 1 on host n7 has been in data")
    )
    say_how_it_went(attempt, 1, "rank 1 on host n7 has been in data")
    _, out, _ = forescale("status", "small")
    assert re.search(r"^ +2 +step 4 .* hang *$", out, re.MULTILINE)
    assert out.count("rank 1 on host n7 has been in data") == 1
    assert "attempts/0002/hang-*.txt" in out
