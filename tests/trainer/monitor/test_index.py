"""The index of `forescale status`: it saves time, and never shows what the files no longer say."""

import json
import os
import pickle
import shutil
import time
from functools import partial
from pathlib import Path

import pytest

from forescale.ground.storage import write_json
from forescale.monitor import follow, overview
from forescale.monitor.overview import Index
from forescale.monitor.status import Statuses
from forescale.resilience.heartbeat import Heartbeat, RankStatus, write_node
from forescale.run.directory import Run
from forescale.verbs.status import StatusJob, page_of
from tests.trainer.monitor.changed_run import changed_rows, say_how_it_went
from tests.trainer.small_run import make_run


def page(root="runs", width=250) -> str:
    job = StatusJob()
    job.run.root = str(root)
    return page_of(job, Index(Path(root)), width).plain


def page_without(monkeypatch, tmp_path) -> str:
    """The page of a user who has no index."""
    with monkeypatch.context() as m:
        m.setenv("FORESCALE_CACHE", str(tmp_path / "empty"))
        shutil.rmtree(tmp_path / "empty", ignore_errors=True)
        return page()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def later(monkeypatch):
    """An hour after the last change: later(seconds) is that much later."""
    now = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: now)
    return lambda seconds: monkeypatch.setattr(time, "time", lambda: now + seconds)


@pytest.fixture
def runs(unfinished, small_data, later) -> list[Run]:
    """A run of two attempts that has ended, and one of imported weights."""
    first, second = unfinished.attempts()
    began, noted = time.time() - 40, time.time() - 30
    beat = Heartbeat(0, "a", 1, began, noted, 8, "compute", "forward", 0.0, 60.0, 60.0, False)
    write_node(first.path, "a", [RankStatus(beat, 0.0)])
    say_how_it_went(second, 1, "rank 0 was killed")
    (second.path / "rank-0.log").write_text("a line\n")
    os.utime(unfinished.checkpoint_path(4), (began - 10_000,) * 2)
    weights = make_run(small_data, "runs", "weights")
    shutil.rmtree(weights.path / "attempts")
    shutil.copytree(weights.checkpoint_path(4), weights.checkpoint_path(0))
    write_json(weights.imported, {"files": {}})
    return [unfinished, weights]


def changes(path: Path):
    """Yield pairs of functions: one changes a file or directory, the other puts it back."""
    aside = path.with_name("aside")
    if path.is_dir():
        yield (path / "9999").mkdir, (path / "9999").rmdir
    else:
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes(b ^ 1 for b in content[middle : middle + 1])
        flipped += content[middle + 1 :]

        def overwrite(data=content):
            """As if nothing had happened."""
            stat = path.stat()
            path.write_bytes(data)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

        for data in (flipped, content[:middle]):
            yield partial(overwrite, data), overwrite
        yield path.touch, lambda: None
    yield partial(path.rename, aside), partial(aside.rename, path)


def test_whatever_changes_in_a_run_the_index_shows_it(runs, monkeypatch, tmp_path):
    run, weights = runs
    files = [p for p in run.path.rglob("*") if not p.is_symlink() and p.suffix != ".safetensors"]
    visible, before = set(), page()
    for path in [*sorted(files, reverse=True), weights.imported, weights.checkpoint_path(0)]:
        for number, (change, restore) in enumerate(changes(path)):
            change()
            after = page()
            assert after == page_without(monkeypatch, tmp_path), (path, number)
            visible |= {str(path.relative_to(path.parents[-2]))} if after != before else set()
            restore()
    parts = ("config.yaml", "checkpoints/step-00000008/state.json", "attempts/0001/parent.json")
    parts += ("attempts/0001/metrics.jsonl", "attempts/0001/heartbeat/a.json")
    parts += ("attempts/0002/metrics.jsonl", "attempts/0002/launch.json")
    assert visible >= {"weights/imported.json", *(f"small/{part}" for part in parts)}


def test_whatever_appears_in_a_run_the_index_shows_it(runs, monkeypatch, tmp_path):
    run, weights = runs
    additions = (
        lambda: write_json(weights.averaged, {}),
        lambda: run.attempts()[-1].event("halt", reason="diverged", step=6),
        lambda: (run.attempts()[-1].path / "rank-1.log").touch(),
        lambda: shutil.rmtree(run.checkpoint_path(8)),
        run.new_attempt,
        lambda: make_run_named(runs, "another"),
        lambda: shutil.rmtree(weights.path),
    )
    before = page()
    for number, add in enumerate(additions):
        add()
        after = page()
        assert after == page_without(monkeypatch, tmp_path), number
        assert number == 2 or after != before, number
        before = after


def make_run_named(runs, name):
    shutil.copytree(runs[0].path, runs[0].path.with_name(name), symlinks=True)


def test_runs_that_stand_still_are_not_read_again(runs, later, monkeypatch):
    narrow, wide = page(width=80), page()
    monkeypatch.setattr(Statuses, "of", lambda *args: pytest.fail("read again"))
    assert (page(width=80), page()) == (narrow, wide)
    monkeypatch.chdir("runs")
    assert page(Path("../runs").resolve()) == wide, "named in another way"
    later(7200)
    assert "3 h ago" in page("."), "the clock goes on"


def test_what_depends_on_the_clock_or_the_queue_is_not_stored(unfinished, later):
    later(-3570)
    assert "running" in page()
    later(0)
    assert "crashed" in page()
    later(-3600)
    assert "running" in page(), "the clock has gone back"
    later(0)
    page()
    table = Index(Path("runs"))
    assert table.row(unfinished, job_runs=True).cells["ETA"] == "4 s"
    table.store()
    assert table.row(unfinished, job_runs=False).cells["ETA"] == "-"


def test_a_run_that_has_just_changed_is_not_stored(runs, cache, later):
    """Within a tick of the file system's clock, a second change would leave no mark."""
    later(-3600)
    assert "crashed" in page()
    (path,) = cache.iterdir()
    assert json.loads(path.read_text())["rows"] == {}


def damage(path: Path):
    stored = json.loads(path.read_text())
    text, rows = json.dumps(stored), stored["rows"]
    first = next(iter(rows))
    yield b""
    yield text[: len(text) // 2].encode()
    yield b"[" * 100_000
    yield b"\0" * 1000
    yield pickle.dumps(stored)
    yield text.replace('"format": 1', '"format": 2').replace("crashed", "complete").encode()
    for name, value in (("state", "[/]"), ("saved", "8"), ("seen", None), ("cells", {"loss": 1})):
        yield json.dumps({**stored, "rows": {**rows, first: {**rows[first], name: value}}}).encode()


def test_a_damaged_index_is_none(runs, cache):
    sound_page = page()
    (path,) = cache.iterdir()
    sound = json.loads(path.read_text())
    for number, data in enumerate(damage(path)):
        path.write_bytes(data)
        assert page() == sound_page, number
        assert json.loads(path.read_text())["rows"].keys() == sound["rows"].keys(), number
        assert path.stat().st_mode & 0o777 == 0o600


def test_an_index_of_another_is_none(runs, cache, monkeypatch, tmp_path):
    sound_page = page()
    (path,) = cache.iterdir()
    false = path.read_text().replace('"state": "crashed"', '"state": "complete"')
    path.write_text(false)
    assert "complete" in page(), "this user's own is believed"
    path.chmod(0o644)
    assert page() == sound_page
    path.unlink()
    (tmp_path / "false.json").write_text(false)
    (tmp_path / "false.json").chmod(0o600)
    path.symlink_to(tmp_path / "false.json")
    assert page() == sound_page
    path.unlink()
    os.mkfifo(path)
    assert page() == sound_page, "nobody waits for it"


def test_a_place_that_takes_no_index_does_no_harm(runs, tmp_path, monkeypatch):
    sound_page = page()
    (tmp_path / "file").touch()
    for place in ("/proc/none", str(tmp_path / "file")):
        monkeypatch.setenv("FORESCALE_CACHE", place)
        assert [page(), page()] == [sound_page, sound_page]

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(overview, "cache_directory", homeless)
    assert [page(), page()] == [sound_page, sound_page]


def test_two_pages_at_once_leave_a_sound_index(runs, cache):
    first, second = Index(Path("runs")), Index(Path("runs"))
    for each in (first, second):
        for run in runs:
            each.row(run, job_runs=False)
    first.store()
    second.store()
    first.store()
    assert [path.name[:5] for path in cache.iterdir()] == ["runs-"]
    assert "crashed" in page()


def test_damage_far_back_is_said_each_time(own_run, later, monkeypatch):
    monkeypatch.setattr(follow, "BLOCK", 300)  # as if the file were long
    monkeypatch.setattr(follow, "RECENT", 2)
    with changed_rows(own_run) as rows:
        rows[0]["crc"] = "00000000"
    assert "damaged" not in page(width=80)
    for _ in range(2):
        assert "line 1: the row is damaged" in page()
