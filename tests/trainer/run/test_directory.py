"""Attempts, lineage and rows: what a run directory promises, without an engine."""

import errno
import json
import math
import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.ground.errors import UserError
from forescale.ground.storage import hash_file
from forescale.run.directory import Parent, Run
from forescale.run.rows import RowWriter, read_rows
from tests import disks


def begin(run, step, name=None):
    """A new attempt that goes on from `step`."""
    attempt = run.new_attempt()
    attempt.start_from(Parent(step, name), run)
    return attempt


def row(step, **fields):
    return {"kind": "train", "step": step, **fields}


def test_launches_that_race_never_share_an_attempt(tmp_path):
    run = Run(tmp_path / "first")
    attempts, gate = [], threading.Barrier(8)

    def launch():
        gate.wait()
        attempts.extend(run.new_attempt().number for _ in range(10))

    threads = [threading.Thread(target=launch) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(attempts) == list(range(1, 81))
    assert [a.number for a in run.attempts()] == sorted(attempts)
    assert run.new_attempt().path.name == "0081"


class Oracle:
    """The trajectory as a list: a save appends, an attempt that starts from a step cuts off all
    that came after it. What is still on it is eligible."""

    def __init__(self):
        self.saved: list[tuple[int, int]] = []

    def start(self, step):
        self.saved = [(a, s) for a, s in self.saved if s <= step]

    def save(self, attempt, step):
        self.saved.append((attempt, step))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_a_checkpoint_counts_while_no_later_attempt_went_on_from_before_it(seed):
    """Any history: attempts that start from any checkpoint that counts, or die before they do."""
    import tempfile

    rng, oracle, every = random.Random(seed), Oracle(), []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        for _ in range(rng.randint(1, 6)):
            attempt = run.new_attempt()
            if rng.random() < 0.2:
                continue  # killed before it trained
            step = rng.choice([0, *(s for _, s in oracle.saved)])
            oracle.start(step)
            attempt.start_from(Parent(step), run)
            for _ in range(rng.randint(0, 4)):
                step += rng.randint(1, 3)
                oracle.save(attempt.number, step)
                every.append((attempt.number, step))
        eligible = [pair for pair in every if run.is_eligible(*pair)]
        assert eligible == [pair for pair in every if pair in oracle.saved]


def test_an_attempt_begins_with_the_rows_up_to_its_parent(tmp_path):
    run = Run(tmp_path)
    first = begin(run, 0)
    for step in range(1, 8):
        first.metrics.add(row(step, loss=1 / 3 / step))
        if step == 4:
            first.metrics.add({"kind": "validation", "step": 4, "loss": 2.5})
    second = begin(run, 4, "step-00000004")
    rows = read_rows(second.metrics.path)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 4]
    assert rows[:4] == read_rows(first.metrics.path)[:4]  # with all digits
    assert second.parent == Parent(4, "step-00000004")
    second.metrics.add(row(5))
    assert [r["step"] for r in read_rows(run.metrics)] == [1, 2, 3, 4, 4, 5]
    assert len(read_rows(first.metrics.path)) == 8, "the old attempt's file was touched"


def test_the_links_stand_for_the_newest_attempt_that_trained(tmp_path):
    run = Run(tmp_path)
    first = begin(run, 0)
    first.event("ended")
    assert run.new_attempt().parent is None  # it dies before it trains
    assert read_rows(run.events)[0]["kind"] == "ended"
    second = begin(run, 0)
    for name, file in (("metrics", second.metrics.path), ("events", second.events.path)):
        link = tmp_path / f"{name}.jsonl"
        assert link.is_symlink()
        assert link.resolve() == file.resolve()
        assert not link.readlink().is_absolute()  # so that the directory can be moved
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert read_rows(Run(moved).events) == []
    moved.rename(tmp_path)


def test_an_attempt_that_was_overtaken_while_it_started_takes_nothing(tmp_path):
    """It was suspended before it began; a newer one trained meanwhile."""
    run = Run(tmp_path)
    late, newer = run.new_attempt(), run.new_attempt()
    newer.start_from(Parent(0), run)
    for step in range(1, 6):
        newer.metrics.add(row(step))

    def outside():
        paths = (p for p in tmp_path.rglob("*") if late.path not in (p, *p.parents))
        return {
            p: p.readlink() if p.is_symlink() else p.is_file() and p.read_bytes() for p in paths
        }

    before = outside()
    late.start_from(Parent(2), run)
    late.metrics.add(row(3))
    assert outside() == before
    assert run.metrics == newer.metrics.path
    assert [r["step"] for r in read_rows(run.metrics)] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match=r"attempt 2 was started after this one.*do nothing"):
        run.expect_newest(late)
    with pytest.raises(UserError, match="attempt 2 was started after this one"):
        run.attempt_after(late)  # a rollback of the late one
    assert run.attempt_after(newer).number == 3


def test_history_is_judged_when_it_is_read_and_not_by_the_links(tmp_path):
    run = Run(tmp_path)
    old, new = begin(run, 0), begin(run, 0)
    new.metrics.add(row(1))
    run_link = tmp_path / "metrics.jsonl"
    run_link.unlink()
    run_link.symlink_to(Path("attempts", old.path.name, "metrics.jsonl"))
    assert [r["step"] for r in read_rows(run.metrics)] == [1]


def test_copies_beside_checkpoints_and_attempts_are_neither(tmp_path):
    run = Run(tmp_path)
    begin(run, 0)
    run.checkpoint_path(83).mkdir(parents=True)
    for name in ("step-00000083.bak", "step-83", "step-", "step-x", "step-0000008²"):
        (run.checkpoints / name).mkdir()
    for name in ("0001.bak", "²", "1", ".nfs0001", "notes"):
        (tmp_path / "attempts" / name).mkdir()
    assert run.checkpoint_steps() == [83]
    assert [a.number for a in run.attempts()] == [1]
    assert run.new_attempt().number == 2


def flipped(data):
    for i in range(len(data)):
        yield i, data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :]


def test_a_flipped_byte_of_a_row_is_a_sentence_or_changes_nothing(tmp_path):
    """It may hide the checksum, or cut the file's last row off."""
    writer = RowWriter(tmp_path / "m.jsonl")
    for step in (1, 2):
        writer.add(row(step, loss=1 / 3, seconds={"data": 0.5}))
    whole, rows = writer.path.read_bytes(), read_rows(writer.path)
    assert "crc" not in rows[0]
    for _, harmed in flipped(whole):
        writer.path.write_bytes(harmed)
        try:
            flipped_rows = read_rows(writer.path)
        except UserError:
            continue
        flipped_rows = [
            {k: r.get(k) for k in rows[0]} for r in flipped_rows
        ]  # without a key like "crb"
        assert flipped_rows in (rows, rows[:1])


def test_a_writer_knows_size_and_checksum_of_its_file(tmp_path):
    writer = RowWriter(tmp_path / "m.jsonl")
    assert writer.state().size == 0
    for step in (1, 2, 3):
        writer.add(row(step))
        assert writer.state() == hash_file(writer.path)
    again = RowWriter(writer.path)
    assert again.state() == writer.state()
    again.add(row(4))
    assert again.state() == hash_file(writer.path)


@pytest.mark.parametrize("torn", ["", "{", '{"kind": "train", "st', '{"kind": "train", "step": 3'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    run = Run(tmp_path)
    first = begin(run, 0)
    first.metrics.add(row(1))
    first.metrics.add(row(2))
    with open(first.metrics.path, "a") as f:
        f.write(torn)
    assert [r["step"] for r in read_rows(run.metrics)] == [1, 2]
    second = begin(run, 2)
    second.metrics.add(row(3))
    lines = run.metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_row_that_a_full_disk_cuts_short_is_an_error_and_the_next_ones_are_whole(tmp_path):
    """A disk that is almost full takes a part of the row and reports no error for it."""
    with disks.small_disk(tmp_path / "disk", "64k") as disk:
        rows, steps = RowWriter(disk / "metrics.jsonl"), []
        filling = disks.fill(disk)

        def write_on():
            for step in range(1, 200):  # more than fits into the page that the disk still has
                rows.add(row(step, text="x" * 300))
                steps.append(step)

        with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
            write_on()
        filling.unlink()
        assert [r["step"] for r in read_rows(disk / "metrics.jsonl")] == steps
        rows.add(row(1000))
        assert [r["step"] for r in read_rows(disk / "metrics.jsonl")] == [*steps, 1000]


def test_rows_that_a_failed_sync_lost_are_written_again(tmp_path, monkeypatch):
    """After a failed fsync the system may have dropped what it couldn't write."""
    path = tmp_path / "metrics.jsonl"
    rows = RowWriter(path)
    rows.add(row(1))
    rows.sync()
    durable = path.stat().st_size
    rows.add(row(2))

    def losing(fd):
        os.truncate(path, durable)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", losing)
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            rows.sync()
    rows.add(row(3))
    rows.sync()
    rows.add(row(4))
    assert [r["step"] for r in read_rows(path)] == [1, 2, 3, 4]


def test_an_unknown_run_is_answered_with_the_known_ones(tmp_path):
    for name in ("a", "b", ".a.new.stage"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    with pytest.raises(UserError, match=r"no run has this name.*are: a, b\."):
        Run.existing("c", tmp_path)
    assert Run.existing("a", tmp_path).path == tmp_path / "a"
    assert Run.existing(tmp_path / "b").name == "b"


def test_links_do_not_depend_on_how_the_paths_are_written(tmp_path, monkeypatch):
    """On a cluster the attempt's path is absolute, and the run's may be relative."""
    monkeypatch.chdir(tmp_path)
    attempt = Run(tmp_path / "runs/x").new_attempt()
    attempt.start_from(Parent(0), Run("runs/x"))
    attempt.event("seen")
    assert [row["kind"] for row in Run("runs/x").read_events()] == ["seen"]
    assert Path("runs/x/events.jsonl").readlink() == Path("attempts/0001/events.jsonl")


def test_numbers_that_were_not_finite_come_back_as_nan(tmp_path):
    row = {"kind": "train", "step": 1, "loss": math.inf, "extra.width": math.nan, "why": None}
    RowWriter(tmp_path / "m.jsonl").add(row)
    (row_read,) = read_rows(tmp_path / "m.jsonl")
    assert math.isnan(row_read["loss"])
    assert math.isnan(row_read["extra.width"])
    assert row_read["why"] is None
