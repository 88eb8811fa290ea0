"""Logs of nodes: whole lines of several ranks in one file, renamed when it is large."""

import os
import select
import subprocess
import sys

import pytest

from forescale.resilience import rank_log
from forescale.resilience.rank_log import NodeLog, RankLog

WRITER = """
import os, sys
from pathlib import Path
from forescale.resilience.rank_log import NodeLog
rank = int(sys.argv[2])
log = NodeLog(Path(sys.argv[1]), rank, False)
for i in range(2000):
    os.write(log.end, f"{i} of {rank}: |".encode())
    log.copy()
    os.write(log.end, b"x" * (i % 300) + b"\\n")
log.close()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "node-4.log"


def write(log: NodeLog, text: bytes) -> None:
    os.write(log.end, text)
    log.copy()


def test_each_rank_of_a_node_has_its_lines_whole_and_in_order(path):
    words = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*words, str(rank)]) for rank in (1, 11)]
    assert [writer.wait() for writer in writers] == [0, 0]
    for rank in (1, 11):
        lines = [f"{i} of {rank}: |{'x' * (i % 300)}\n" for i in range(2000)]
        assert RankLog(path, rank).last(5000) == lines
    assert RankLog(path, 0).last(9) == []


def test_a_reader_gets_lines_when_they_are_whole(path):
    read = RankLog(path, 7).reader()
    assert read() == "", "there is no file yet"
    log, other = NodeLog(path, 7, True), NodeLog(path, 8, False)
    write(log, b"be")
    write(other, b"7: not of seven\n")
    assert read() == ""
    write(log, b"gun\n\nnow")
    assert [read(), read(), read()] == ["begun\n", "\n", ""]
    with open(path, "a") as file:
        file.write("  7: of srun: a label of more digits\n 17: another\n")
        file.flush()
        assert [read(), read()] == ["of srun: a label of more digits\n", ""]
        file.write("7: in two")
        file.flush()
        assert read() == ""
        file.write(" pieces\n")
    assert [read(), read()] == ["in two pieces\n", ""]
    log.close()
    assert [read(), read()] == ["now\n", ""], "though its line had no end"


def test_a_large_file_is_renamed_and_no_line_is_lost(path, monkeypatch):
    monkeypatch.setattr(rank_log, "LARGEST", 1000)
    read, lines = RankLog(path, 2).reader(), []
    log, other = NodeLog(path, 2, True), NodeLog(path, 3, False)
    for i in range(300):
        write(log, b"line %d\n" % i)
        write(other, b"line %d\n" % i)
        lines += iter(read, "")
    assert lines == [f"line {i}\n" for i in range(300)]
    files = sorted(path.parent.iterdir())
    assert files == [path, path.with_name("node-4.log.1")]
    assert sum(file.stat().st_size for file in files) < 3000
    last = RankLog(path, 3).last(1000)
    assert last == lines[-len(last) :], "of both files"
    assert len(last) > 20
    for i in range(300):
        write(other, b"after %d\n" % i)  # nothing comes of the one that renames
    log.rotate()
    assert not path.exists()
    assert RankLog(path, 3).exists


def test_a_line_is_read_that_comes_just_before_the_file_is_renamed(path, monkeypatch):
    log, after = NodeLog(path, 2, False), RankLog._after
    read = RankLog(path, 2).reader()
    write(log, b"first\n")
    assert [read(), read()] == ["first\n", ""]

    def late(self, file):
        monkeypatch.undo()
        write(log, b"second\n")
        path.rename(f"{path}.1")
        write(log, b"third\n")
        return after(self, file)

    monkeypatch.setattr(RankLog, "_after", late)
    assert [read(), read(), read()] == ["second\n", "third\n", ""]


def test_a_full_disk_costs_lines_and_the_log_says_so(path):
    path.symlink_to("/dev/full")
    log = NodeLog(path, 5, False)
    write(log, b"lost\n")
    path.unlink()
    write(log, b"there is room again\n")
    write(log, b"last\n")
    assert RankLog(path, 5).last(9) == [
        "forescale: lines are missing here: No space left on device\n",
        "there is room again\n",
        "last\n",
    ]


def test_what_a_dead_rank_has_started_does_not_keep_its_template(path):
    log = NodeLog(path, 0, True)
    flood = subprocess.Popen(["yes", "y" * 999], stdout=log.end)
    try:
        select.select([log.source], [], [])
        log.close()
    finally:
        flood.kill()
        flood.wait()
    assert RankLog(path, 0).last(9)[0] == "y" * 999 + "\n"


def test_a_rank_is_not_held_up_by_what_nobody_copies(path):
    log = NodeLog(path, 0, True)
    os.set_blocking(log.end, False)
    assert os.write(log.end, b"x" * 500_000) == 500_000
    log.close()
    assert len("".join(RankLog(path, 0).last(100)).replace("\n", "")) == 500_000


def test_only_the_newest_attempts_keep_logs_of_nodes(tmp_path):
    attempts = [tmp_path / str(i) for i in range(22)]
    for attempt in attempts:
        attempt.mkdir()
        for name in ("node-0.log", "node-0.log.1", "rank-1.error"):
            (attempt / name).touch()
    rank_log.remove_old(attempts)
    counts = [len(list(attempt.iterdir())) for attempt in attempts]
    assert counts == [1, 1, *[3] * 20], "and errors stay"
