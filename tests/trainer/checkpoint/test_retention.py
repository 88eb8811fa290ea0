"""What stays and what goes, by every rule; that nothing goes before what replaces it is read back;
pins and pruning."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forescale.checkpoint import retention
from forescale.checkpoint.retention import (
    CheckpointFacts,
    Keep,
    Retention,
    ValidationLosses,
    is_pinned,
    pin,
    reasons,
    steps_to_verify,
)
from forescale.checkpoint.saver import Saver
from forescale.config.sections.batch import Cadence
from forescale.engine.ranks import ALONE
from forescale.ground.errors import UserError
from forescale.ground.storage import hash_file
from forescale.monitor.status import Status
from forescale.run.directory import Run
from forescale.run.rows import read_rows
from forescale.train.callbacks import Checkpoints, Every
from tests.trainer import plain_engine as plain

CHECKPOINTS = [CheckpointFacts(step, 1, True) for step in (10, 20, 30, 40, 50, 60)]


def kept_steps(checkpoints, **keep):
    return sorted(reasons(checkpoints, Keep(**keep)))


def test_the_newest_the_multiples_the_best_and_the_pinned_stay():
    assert kept_steps(CHECKPOINTS) == [50, 60]
    assert kept_steps(CHECKPOINTS, newest=3) == [40, 50, 60]
    assert kept_steps(CHECKPOINTS, every=Cadence(20)) == [20, 40, 50, 60]
    assert kept_steps(CHECKPOINTS, at=frozenset({10, 15, 40})) == [10, 40, 50, 60]
    losses = {10: 3.0, 20: 2.5, 30: 2.25, 40: 2.75}
    scored = [CheckpointFacts(f.step, 1, True, loss=losses.get(f.step)) for f in CHECKPOINTS]
    assert kept_steps(scored, best=True) == [30, 50, 60]
    assert kept_steps(scored) == [50, 60]
    assert kept_steps([CheckpointFacts(10, 1, True, pinned=True), *CHECKPOINTS[1:]]) == [10, 50, 60]
    assert reasons(scored, Keep(2, Cadence(20), True)) == {
        20: "a multiple of 20 steps",
        30: "the lowest validation loss",
        40: "a multiple of 20 steps",
        50: "one of the newest 2",
        60: "one of the newest 2",
    }


def test_the_last_one_before_the_decay_stays():
    """A longer run can only go on from there."""
    assert kept_steps(CHECKPOINTS, decay=35) == [30, 50, 60]
    assert kept_steps(CHECKPOINTS, decay=30) == [30, 50, 60]
    assert kept_steps(CHECKPOINTS, decay=70) == [50, 60]
    assert kept_steps(CHECKPOINTS, decay=5) == [50, 60]
    damaged = [CheckpointFacts(f.step, 1, f.step != 30) for f in CHECKPOINTS]
    assert kept_steps(damaged, decay=35) == [20, 50, 60]


def test_what_does_not_count_is_no_safety_and_goes_once_something_newer_counts():
    """Such a one can never be loaded again, but it may be all that a human has."""
    stale = [CheckpointFacts(30, 1, False), CheckpointFacts(40, 1, False)]
    assert kept_steps([CheckpointFacts(10, 1, True), CheckpointFacts(20, 1, True), *stale]) == [
        10,
        20,
        30,
        40,
    ]
    assert kept_steps([CheckpointFacts(20, 2, True), *stale]) == [20]
    assert kept_steps(stale) == [30, 40]
    assert kept_steps(
        [CheckpointFacts(20, 1, True), CheckpointFacts(30, 2, False), CheckpointFacts(40, 3, False)]
    ) == [20, 30, 40]
    assert kept_steps(
        [CheckpointFacts(20, 1, True), CheckpointFacts(30, 1, False), CheckpointFacts(40, 1, True)]
    ) == [20, 40]
    assert kept_steps(
        [CheckpointFacts(20, 2, True), CheckpointFacts(30, 1, False, pinned=True)]
    ) == [20, 30]


facts = st.builds(
    CheckpointFacts,
    step=st.integers(1, 40),
    attempt=st.integers(1, 4),
    eligible=st.booleans(),
    pinned=st.booleans(),
    loss=st.none() | st.floats(1, 9),
)
keeps = st.builds(
    Keep,
    newest=st.integers(2, 4),
    every=st.none() | st.builds(Cadence, st.integers(1, 9)),
    best=st.booleans(),
)


@given(st.lists(facts, max_size=12, unique_by=lambda f: f.step), keeps)
def test_whatever_there_is_the_newest_and_the_pinned_stay_and_deleting_twice_is_deleting_once(
    checkpoints, keep
):
    checkpoints.sort(key=lambda f: f.step)
    stay = reasons(checkpoints, keep)
    good = [f.step for f in checkpoints if f.eligible]
    assert set(good[-keep.newest :]) <= stay.keys() <= {f.step for f in checkpoints}
    assert {f.step for f in checkpoints if f.pinned} <= stay.keys()
    assert steps_to_verify(checkpoints, keep) == good[-keep.newest :][::-1]
    left = [f for f in checkpoints if f.step in stay]
    assert reasons(left, keep).keys() == stay.keys()


# On the disk


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def publish(run, attempt, *steps):
    engine = plain.engine(width=2)
    for step in steps:
        plain.set_step(engine, step)
        plain.write_checkpoint(run, attempt.number, plain.position(step), engine)


def retain(run, attempt, keep=Keep(), ranks=ALONE, parts=None):  # noqa: B008
    """(what is told, what is left)"""
    events = []
    part = parts or Retention(
        run, attempt.number, keep, attempt.metrics.path, lambda kind, **f: events.append((kind, f))
    )
    part(ranks)
    return [(kind.removeprefix("checkpoint_"), f["step"]) for kind, f in events]


def test_the_older_ones_go_and_what_does_not_count(run):
    first = plain.begin(run)
    publish(run, first, 10, 20, 30, 40)
    second = plain.begin(run, 20)
    assert retain(run, first) == [], "an old attempt has a say"
    assert retain(run, second) == []
    assert run.checkpoint_steps() == [10, 20, 30, 40]
    publish(run, second, 25)
    assert retain(run, second) == [("deleted", 10), ("deleted", 30), ("deleted", 40)]
    publish(run, second, 35)
    assert retain(run, second) == [("deleted", 20)]
    assert retain(run, second) == []
    assert run.checkpoint_steps() == [25, 35]
    assert not list(run.checkpoints.glob(".*"))


def test_what_cannot_be_read_is_left(run):
    attempt = plain.begin(run)
    publish(run, attempt, 10, 20, 30)
    (run.checkpoint_path(20) / "state.json").write_text("{")
    assert retain(run, attempt) == []
    publish(run, attempt, 40)
    assert retain(run, attempt) == [("deleted", 10)]
    assert run.checkpoint_steps() == [20, 30, 40]


def test_nothing_goes_before_what_replaces_it_is_read_back(run):
    """The newest is damaged: it is no safety, so the one before the next stays."""
    attempt = plain.begin(run)
    publish(run, attempt, 10, 20, 30)
    plain.harm(run, 30)
    assert retain(run, attempt) == [("damaged", 30)]
    assert run.checkpoint_steps() == [10, 20, 30]
    publish(run, attempt, 40)
    part = Retention(run, 1, Keep(), attempt.metrics.path, lambda *_, **__: None)
    part(ALONE)
    assert run.checkpoint_steps() == [20, 40], "what is damaged was counted among the two"
    plain.harm(run, 40)
    publish(run, attempt, 50, 60)
    plain.harm(run, 60)
    part(ALONE)
    assert run.checkpoint_steps() == [40, 50, 60], "40 was read back before it was harmed"


def test_reading_back_goes_to_the_storage_and_not_again_to_what_was_read(run, monkeypatch):
    attempt, read = plain.begin(run), []

    def noted(path, tick, afresh):
        read.append((int(path.parent.name[-2:]), afresh))
        return hash_file(path, tick, afresh)

    monkeypatch.setattr("forescale.ground.storage.hash_file", noted)
    part = Retention(run, attempt.number, Keep(), attempt.metrics.path, lambda *_, **__: None)
    publish(run, attempt, 10, 20)
    part(ALONE)
    assert read == [], "there was nothing to delete"
    for step, expected in ((30, {20, 30}), (40, {40})):
        publish(run, attempt, step)
        part(ALONE)
        assert {s for s, _ in read} == expected
        assert all(afresh for _, afresh in read)
        read.clear()


def test_each_rank_reads_back_its_share_and_one_that_finds_damage_stops_all(run, monkeypatch):
    worlds, attempt = plain.worlds(3), plain.begin(run)
    engines = [plain.engine(world, width=4) for world in worlds]
    for step in (10, 20, 30):

        def save(world, step=step):
            plain.set_step(engines[world.rank], step)
            plain.write_checkpoint(run, attempt.number, plain.position(step), engines[world.rank])

        plain.on_all(worlds, save)
    path = run.checkpoint_path(30) / "rank-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    results = plain.on_all(worlds, lambda w: retain(run, attempt, ranks=w))
    assert results == [[("damaged", 30)], [], []]
    assert run.checkpoint_steps() == [10, 20, 30]


def test_losses_are_read_on_from_where_they_ended(tmp_path):
    rows, losses = tmp_path / "metrics.jsonl", ValidationLosses(tmp_path / "metrics.jsonl")
    assert losses() == {}
    row = '{{"kind": "{}", "step": {}, "dataset": "{}", "loss": {}}}\n'
    first = row.format("validation", 4, "validation", 2.5)
    others = row.format("train", 5, "validation", 1.0) + row.format("validation", 6, "web", 1.0)
    others += row.format("validation", 2, "validation", "null")  # it was no number: never the best
    rows.write_text(first + others + first[:20])
    assert losses() == {4: 2.5}
    with open(rows, "a") as f:
        f.write(first[20:].replace('"step": 4', '"step": 8'))
    assert losses() == {4: 2.5, 8: 2.5}
    rows.write_text("x" * (len(first + others) + len(first)))  # it is not read again
    assert losses() == {4: 2.5, 8: 2.5}


def test_the_part_keeps_multiples_the_best_and_the_pinned(run):
    attempt, engine = plain.begin(run), plain.engine()
    rules = Keep(2, Cadence(40), best=True)
    part = Checkpoints(Every(Cadence(10), 100), Saver(run, attempt, engine, dict, rules))
    for step in range(10, 100, 10):
        row = {"kind": "validation", "step": step, "dataset": "validation"}
        attempt.metrics.add({**row, "loss": abs(step - 30)})
        plain.set_step(engine, step)
        part.save(plain.position(step))
        if step == 20:
            pin(run, 20)
    assert run.checkpoint_steps() == [20, 30, 40, 80, 90]
    deleted = [r["step"] for r in read_rows(run.events, kind="checkpoint_deleted")]
    assert deleted == [10, 50, 60, 70]
    pin(run, 20, off=True)
    part.save(plain.position(100))
    assert run.checkpoint_steps() == [30, 40, 80, 90, 100]


def test_a_pin_is_no_checkpoint_and_holds_for_what_is_deleted_at_that_moment(run, monkeypatch):
    attempt = plain.begin(run)
    publish(run, attempt, 10, 20, 30)
    assert pin(run, 10)
    assert not pin(run, 10)
    assert run.checkpoint_steps() == [10, 20, 30]
    assert retain(run, attempt) == []
    pin(run, 10, off=True)
    whole = retention.find_faults

    def pinned_meanwhile(*args, **options):
        pin(run, 10)
        return whole(*args, **options)

    monkeypatch.setattr(retention, "find_faults", pinned_meanwhile)
    assert retain(run, attempt) == []
    assert run.checkpoint_steps() == [10, 20, 30]
    with pytest.raises(UserError, match="choose one of these steps: 10, 20, 30"):
        pin(run, 15)


# The verbs


@pytest.fixture
def long_run(own_run):
    """Checkpoints at 2, 4, 6 and 8, of a run that ended long ago."""
    for step in (2, 6):
        shutil.copytree(own_run.checkpoint_path(4), own_run.checkpoint_path(step))
    return own_run


def test_a_checkpoint_that_is_to_come_is_pinned_ahead(tmp_path):
    """For a branch that waits in the queue until its trunk has made it."""
    run = Run(tmp_path / "trunk")
    run.path.mkdir()
    with pytest.raises(UserError, match="no such checkpoint"):
        pin(run, 16)
    assert pin(run, 16, ahead=True)
    assert is_pinned(run, 16)
    assert run.checkpoint_steps() == []
    run.checkpoint_path(20).mkdir()
    with pytest.raises(UserError, match="no such checkpoint"):
        pin(run, 12, ahead=True)  # it was passed
    assert pin(run, 16, off=True)  # nobody waits for it any more
    assert not is_pinned(run, 16)


def test_pin_and_unpin(long_run, forescale):
    assert forescale("pin", "small", "step=4")[:2] == (
        0,
        f"Checkpoint {long_run.checkpoint_path(4)} is pinned.\n",
    )
    assert is_pinned(long_run, 4)
    assert "is pinned already" in forescale("pin", "small", "step=4")[1]
    assert "is not pinned." in forescale("pin", "small", "step=4", "off=true")[1]
    assert not is_pinned(long_run, 4)
    code, _, err = forescale("pin", "small", "step=5")
    assert (code, err.count("\n")) == (2, 1)
    assert "no such checkpoint; choose one of these steps: 2, 4, 6, 8." in err
    assert "step: is missing" in forescale("pin", "small")[2]


def test_prune_shows_first_and_deletes_when_told(long_run, forescale):
    forescale("pin", "small", "step=4")
    (long_run.checkpoints / ".step-00000009.attempt-0001.stage").mkdir()
    code, out, _ = forescale("prune", "small")
    assert code == 0
    lines = [line.split(":")[:2] for line in out.splitlines()[:5]]
    assert [(a.strip(), b.split()[0]) for a, b in lines] == [
        ("step-00000002", "delete"),
        ("step-00000004", "keep"),
        ("step-00000006", "keep"),
        ("step-00000008", "keep"),
        (".step-00000009.attempt-0001.stage", "delete"),
    ]
    assert "nothing is deleted without yes=true" in out
    assert long_run.checkpoint_steps() == [2, 4, 6, 8]
    code, out, _ = forescale("prune", "small", "yes=true")
    assert code == 0
    assert "Deleted 1 checkpoints" in out
    assert long_run.checkpoint_steps() == [4, 6, 8]
    assert not list(long_run.checkpoints.glob(".*"))
    assert "Nothing to delete." in forescale("prune", "small", "yes=true")[1]
    assert "keep: must be at least 2" in forescale("prune", "small", "keep=1")[2]


def test_prune_keeps_the_last_one_before_the_decay(long_run, forescale):
    out = forescale("prune", "small", "keep=2", "yes=true")[1]
    assert (
        "step-00000004: keep: the last before the decay, from which a longer run can go on" in out
    )
    assert long_run.checkpoint_steps() == [4, 6, 8]


def test_prune_deletes_nothing_where_a_newer_one_is_damaged(long_run, forescale):
    plain.harm(long_run, 8)
    code, _, err = forescale("prune", "small", "yes=true")
    assert code == 2
    assert "nothing is deleted, because a checkpoint that stays is damaged" in err
    assert "step-00000008" in err
    assert long_run.checkpoint_steps() == [2, 4, 6, 8]


def test_prune_leaves_a_run_alone_that_trains(long_run, forescale, monkeypatch):
    monkeypatch.setattr(Status, "state", "running")
    assert forescale("prune", "small")[0] == 0
    code, _, err = forescale("prune", "small", "yes=true")
    assert code == 2
    assert "the run is training" in err
    assert long_run.checkpoint_steps() == [2, 4, 6, 8]
