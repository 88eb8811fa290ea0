"""What a run has logged is copied to the byte when it resumes, or missed with a sentence."""

import shutil

import pytest

from forescale.ground.errors import UserError
from forescale.run import rows
from forescale.run.directory import Parent, Run
from forescale.run.history import Saved, expect_whole, history_of
from forescale.run.rows import read_rows

LONG = 90  # bytes that make the rows longer than the tail that is looked at


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "first")


def train(run, begin, end, history=None, save=()):
    """An attempt that makes the steps from `begin` to `end`; return it and what it saved."""
    attempt, saved = run.new_attempt(), {}
    attempt.start_from(Parent(begin), run, history)
    for step in range(begin + 1, end + 1):
        attempt.metrics.add({"kind": "train", "step": step, "loss": 1 / step})
        if step in save:
            saved[step] = Saved(step, attempt.number, attempt.metrics.state())
            attempt.metrics.add({"kind": "validation", "step": step, "loss": 2 / step})
            attempt.event("checkpoint_saved", step=step)
    return attempt, saved


def steps(path):
    return [row["step"] for row in read_rows(path)]


def drop_one(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:]))


def flip_one(path):
    data = bytearray(path.read_bytes())
    data[25] ^= 1
    path.write_bytes(data)


def exchange(path):
    """Two rows in another order: each is whole, and no byte is missing."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))


HARM = {
    "a row": (drop_one, "step 3 follows step 1"),
    "a byte": (flip_one, r"line 1: the row is damaged"),
    "the order": (exchange, "step 2 follows step 0"),
    "the half": (lambda p: p.write_bytes(p.read_bytes()[:170]), "they end at step 2"),
    "all": (lambda p: p.write_bytes(b""), "they end at step 0"),
    "the file": (lambda p: p.unlink(), "the file is missing"),
}


@pytest.mark.parametrize("name", HARM)
@pytest.mark.parametrize("recorded", [True, False])
def test_harm_to_the_rows_is_a_sentence(run, name, recorded):
    harm, why = HARM[name]
    attempt, saved = train(run, 0, 6, save=(4,))
    at = saved[4] if recorded else Saved(4, 1)
    assert history_of(run, at).path == attempt.metrics.path
    harm(attempt.metrics.path)
    with pytest.raises(UserError, match=why) as caught:
        history_of(run, at)
    message = str(caught.value)
    assert message.startswith(f"{attempt.metrics.path}: the rows up to step 4")
    assert "run.from.run=first run.from.step=4" in message


@pytest.mark.parametrize("name", HARM)
def test_another_attempt_that_began_with_the_same_rows_has_them_still(run, name):
    first, saved = train(run, 0, 6, save=(4,))
    second, _ = train(run, 4, 5, history_of(run, saved[4]))
    HARM[name][0](first.metrics.path)
    history = history_of(run, saved[4])
    assert history.path == second.metrics.path
    third, _ = train(run, 4, 4, history)
    assert steps(third.metrics.path) == [1, 2, 3, 4, 4]


def test_the_score_of_the_saved_step_is_kept_and_no_later_row(run):
    """The evaluation comes after the save."""
    _, saved = train(run, 0, 9, save=(4, 8))
    second, _ = train(run, 4, 6, history_of(run, saved[4]))
    assert steps(second.metrics.path) == [1, 2, 3, 4, 4, 5, 6]
    assert second.metrics.path.read_bytes().startswith(
        (run.attempts()[0].metrics.path).read_bytes()[: saved[4].rows.size]
    )


def test_rows_longer_than_the_tail_are_read_from_the_start(run):
    attempt = run.new_attempt()
    attempt.start_from(Parent(0), run)
    attempt.metrics.add({"kind": "train", "step": 1, "loss": 1.0})
    attempt.metrics.add({"kind": "validation", "step": 1, "text": "x" * 100_000})
    saved = Saved(1, 1, attempt.metrics.state())
    assert history_of(run, saved).size == saved.rows.size


def test_copying_a_long_history_reads_no_row(run, monkeypatch):
    """All ranks wait for it: bytes are hashed and copied, in blocks."""
    attempt = run.new_attempt()
    attempt.start_from(Parent(0), run)
    line = b'{"kind": "train", "step": %d, "loss": 1.0, "text": "%s"}\n'
    with open(attempt.metrics.path, "ab") as f:
        for step in range(1, 20_001):
            f.write(line % (step, b"x" * LONG))
    saved = Saved(20_000, 1, attempt.metrics.state())
    parsed = []
    real = rows.parse_row
    monkeypatch.setattr(rows, "parse_row", lambda line: parsed.append(1) or real(line))
    second = run.new_attempt()
    second.start_from(Parent(20_000), run, history_of(run, saved))
    assert len(parsed) < 1_000
    assert second.metrics.path.read_bytes() == attempt.metrics.path.read_bytes()


def test_what_is_missing_of_a_run_is_named_and_never_a_fresh_start(run):
    _, saved = train(run, 0, 6, save=(4,))
    train(run, 4, 5, history_of(run, saved[4]))
    attempt = run.new_attempt()
    expect_whole(run, attempt, saved[4])
    with pytest.raises(UserError, match=r"checkpoints: is empty or missing, but step 4 of the run"):
        expect_whole(run, attempt, None)
    shutil.move(run.path / "attempts/0002", run.path / "kept")
    with pytest.raises(UserError, match=r"attempts/0002: is missing"):
        expect_whole(run, attempt, saved[4])
    shutil.move(run.path / "kept", run.path / "attempts/0002")
    shutil.rmtree(run.path / "attempts")
    attempt = run.new_attempt()
    with pytest.raises(UserError, match=r"attempts/0001: is missing or empty, but it has saved"):
        expect_whole(run, attempt, saved[4])
    with pytest.raises(UserError, match=r"attempts: is empty, but the run has trained"):
        expect_whole(run, attempt, None)


def test_a_run_that_never_saved_may_begin_again(run):
    expect_whole(run, run.new_attempt(), None)
    train(run, 0, 3)
    expect_whole(run, run.new_attempt(), None)


def test_an_attempt_that_was_overtaken_does_not_go_on(run):
    late = run.new_attempt()
    _, saved = train(run, 0, 6, save=(4,))
    with pytest.raises(UserError, match="attempt 2 was started after this one, attempt 1"):
        expect_whole(run, late, saved[4])
