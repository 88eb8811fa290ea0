"""What views know of growing files is what reading them whole gives."""

import os
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from forescale.ground.errors import UserError
from forescale.monitor import follow
from forescale.monitor.follow import RECENT, Ledger, Memory, Tail
from forescale.monitor.goodput import Goodput
from forescale.run.directory import Parent, Run
from forescale.run.rows import RowWriter, read_rows, select

PHASES = ("data", "compute", "logging", "a b")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A file of some kB has many blocks, and rows that a block cuts."""
    monkeypatch.setattr(follow, "BLOCK", 1_000)


class Life:
    """A run to which things happen."""

    def __init__(self, path, seed):
        self.run, self.rng = Run(path), random.Random(seed)
        self.step = 0
        self.start()

    @property
    def attempt(self):
        return self.run.attempts()[-1]

    def row(self, step):
        """Most rows have all phases in one order, as real ones do."""
        rng, names = self.rng, list(PHASES)
        if rng.random() < 0.1:
            rng.shuffle(names)
            names = [*names[: rng.randint(1, 4)], "evaluation"]
        seconds = {name: rng.choice([0.0, 1e-6, round(rng.random(), 6), 20.0]) for name in names}
        return {"kind": "train", "step": step, "attempt": self.attempt.number, "seconds": seconds}

    def start(self):
        """An attempt begins at one of the last steps."""
        self.step = self.rng.randint(max(0, self.step - 30), self.step)
        self.run.new_attempt().start_from(Parent(self.step), self.run)

    def grow(self):
        for _ in range(self.rng.choice([1, 3, 40])):
            self.step += 1
            self.attempt.metrics.add(self.row(self.step))

    def score(self):
        row = {"kind": "validation", "step": self.step, "dataset": "validation"}
        self.attempt.metrics.add(row)

    def tear(self):
        """A kill cuts the newest rows off, in the middle of one."""
        path = self.attempt.metrics.path
        os.truncate(path, self.rng.randint(0, path.stat().st_size))
        self.resume(path)

    def replace(self):
        """Another file of that name, or another content of this file."""
        path = self.attempt.metrics.path
        rows = RowWriter(path.with_name("other"))
        for step in range(max(1, self.step - self.rng.randint(0, 60)), self.step):
            rows.add(self.row(step))
        if not rows.path.exists():
            return
        if self.rng.random() < 0.5:
            os.replace(rows.path, path)
        else:
            path.write_bytes(rows.path.read_bytes())
            rows.path.unlink()
        self.resume(path)

    def resume(self, path):
        """Rows are added by another process, after the last whole row."""
        rows = read_rows(path)
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)
        self.step = rows[-1]["step"] if rows else 0


def known(run, memory):
    """What a run's views show of its rows, by a memory."""
    tail, whole = memory.tail(run.metrics), memory.ledger(run.metrics)
    lost = [memory.lost(attempt, run) for attempt in run.attempts()]
    steps_of = [memory.steps_of(attempt, run) for attempt in run.attempts()]
    return {
        "recent": tail.steps,
        "score": tail.scores[-1:],
        "longest": whole.longest,
        "own": [(s.count, s.last, s.first, s.seconds) for s in steps_of],
        "lost": [(s.count, s.total) for s in lost],
    }


def own_steps(attempt):
    return read_rows(attempt.metrics.path, kind="train", attempt=attempt.number)


def read_whole(run):
    """The same by reading every row of every attempt."""
    rows = read_rows(run.metrics)
    steps = select(rows, kind="train")
    places = {(row["attempt"], row["step"]) for row in steps}
    rows_of = [own_steps(attempt) for attempt in run.attempts()]
    lost = [[r for r in every if (r["attempt"], r["step"]) not in places] for every in rows_of]
    return {
        "recent": steps[-RECENT:],
        "score": select(rows, kind="validation")[-1:],
        "longest": max((sum(row["seconds"].values()) for row in steps), default=0.0),
        "own": [(len(r), *_ends(r), _sums(r)) for r in rows_of],
        "lost": [(len(r), sum(_sums(r).values())) for r in lost],
    }


def _ends(rows):
    return (rows[-1]["step"], rows[0]["seconds"]) if rows else (0, {})


def _sums(rows):
    counts = Counter()
    for row in rows:
        counts.update(row["seconds"])
    return counts


def close(value):
    """Sums are added up in another order."""
    if isinstance(value, dict):
        return {k: close(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [close(v) for v in value]
    return round(value, 9) if isinstance(value, float) else value


EVENTS = st.lists(
    st.sampled_from(["grow", "grow", "grow", "score", "start", "tear", "replace"]), max_size=12
)


@example(["grow", "grow", "score", "grow", "grow", "start"], 0)  # a row that names no attempt
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(EVENTS, st.integers(0, 2**32))
def test_what_is_followed_is_what_a_whole_read_gives(tmp_path_factory, events, seed):
    life, memory = Life(tmp_path_factory.mktemp("life"), seed), Memory()
    for event in events:
        getattr(life, event)()
        expected = close(read_whole(life.run))
        assert close(known(life.run, memory)) == expected, event
        assert close(known(life.run, Memory())) == expected, event


def test_only_what_was_added_is_read(tmp_path, monkeypatch):
    life = Life(tmp_path, 1)
    for _ in range(100):
        life.grow()
    ledger, taken = Ledger(life.run.metrics).update(), []
    last = Tail(life.run.metrics).update()
    for one in (ledger, last):
        take = one._take
        monkeypatch.setattr(
            one, "_take", lambda lines, take=take: taken.append(lines) or take(lines)
        )
    ledger.update()
    last.update()
    assert not taken
    life.attempt.metrics.add(life.row(life.step + 1))
    assert ledger.update().by_attempt[1].last == last.update().steps[-1]["step"] == life.step + 1
    assert [len(lines) for lines in taken] == [1, 1]


def test_a_row_is_read_once_for_all_sums(tmp_path, monkeypatch):
    """Of an old attempt only its own rows, not the copied ones before them."""
    life, taken = Life(tmp_path, 6), []
    for _ in range(60):
        life.grow()
    life.start()
    life.grow()
    take = Ledger._take
    monkeypatch.setattr(
        Ledger, "_take", lambda self, lines: taken.extend(lines) or take(self, lines)
    )
    assert Goodput(life.run).lost_steps
    older, newest = (read_rows(a.metrics.path) for a in life.run.attempts())
    assert len(taken) == len(older) + len(newest)
    taken.clear()
    life.start()
    life.grow()
    second = life.run.attempts()[1]
    assert Goodput(life.run).launches[1].steps[0].count == len(own_steps(second))
    assert len(taken) < len(older) + len(read_rows(life.run.metrics)) + len(newest) / 2


@pytest.mark.parametrize("kind", [Ledger, Tail])
def test_a_damaged_row_is_told_as_a_whole_read_tells_it(tmp_path, kind):
    """Again and again, until it is mended."""
    life = Life(tmp_path, 2)
    life.grow()
    life.score()
    path = life.run.metrics
    followed, whole = kind(path).update(), path.read_bytes()
    harmed = bytearray(whole + whole)
    harmed[len(whole) + 40] ^= 1
    path.write_bytes(harmed)
    with pytest.raises(UserError) as expected:
        read_rows(path)
    for _ in range(2):
        with pytest.raises(UserError) as error:
            followed.update()
        assert str(error.value) == str(expected.value)
    path.write_bytes(whole + whole)
    followed.update()


def test_rows_of_an_earlier_version_count_too(tmp_path):
    """They have no checksum, and their fields may stand in another order."""
    life = Life(tmp_path, 3)
    life.grow()
    with open(life.run.metrics, "a") as f:
        f.write('{"step": 900, "kind": "train", "attempt": 1, "seconds": {"data": 7.0}}\n')
        f.write('{"kind": "train", "step": 901, "attempt": 1}\n')
    assert close(known(life.run, Memory())["own"][0][:2]) == [len(read_rows(life.run.metrics)), 901]
    assert Ledger(life.run.metrics).update().longest >= 7.0


@pytest.mark.parametrize("lines", [0, 1])
def test_a_file_that_was_written_anew_in_place_is_read_again(tmp_path, lines):
    """The same file to the system, as long as before or longer, with other rows."""
    path = tmp_path / "m.jsonl"

    def write(name, count):
        rows = RowWriter(tmp_path / name)
        for step in range(1, count + 1):
            seconds = {name if step == 1 else "c": 1.0}
            rows.add({"kind": "train", "step": step, "attempt": 1, "seconds": seconds})
        path.write_bytes(rows.path.read_bytes())

    write("a", 2)  # two rows, of which the last stays the same
    followed = Ledger(path).update()
    write("b", 2 + lines)
    os.utime(path, (1, 1))  # the clock of a file system may tick slowly
    assert followed.update().by_attempt[1].seconds == {"b": 1.0, "c": 1.0 + lines}
