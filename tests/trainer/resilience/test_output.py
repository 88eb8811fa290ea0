"""Rank 0 prints to the terminal and to its log: the one as it is drawn, the other as lines."""

import fcntl
import io
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forescale.resilience.output import Lines

# What rich draws: a line, drawn twice more, a line printed above it, and the end.
DRAWN = (
    "\x1b[?25lstep 1 ━━━━━\r\x1b[2Kstep 2 ━━━━━\r\x1b[2Kstep 3 \x1b[35m━━━╸\x1b[0m"
    "\r\x1b[2Kvalidation loss \x1b[1m2.5\x1b[0m ± 0.1\nstep 3 ━━━━━\r\x1b[2Kstep 4 ━━━━━\n\x1b[?25h"
).encode()


def logged(*pieces: bytes, every: float) -> list[str]:
    file = io.BytesIO()
    lines = Lines(file, every)
    for piece in pieces:
        lines.write(piece)
    lines.end()
    return file.getvalue().decode().splitlines()


@given(st.lists(st.integers(0, len(DRAWN)), max_size=8))
def test_a_line_that_is_redrawn_is_logged_as_it_is_left(cuts):
    """However the output is cut into pieces; the first state of it, and then one an interval."""
    borders = [0, *sorted(cuts), len(DRAWN)]
    pieces = [DRAWN[a:b] for a, b in pairwise(borders)]
    text = logged(*pieces, every=1e9)
    states = [line for line in text if line != "validation loss 2.5 ± 0.1"]
    assert len(states) == len(text) - 1, "what was printed above is there, once"
    assert states in (["step 4"], *([f"step {n}", "step 4"] for n in (1, 2, 3)))
    assert not any("\x1b" in line or "━" in line for line in text)


def test_states_of_a_line_are_logged_at_their_interval():
    frames = [f"\r\x1b[2Kstep {n}".encode() for n in range(1, 100)]
    assert logged(*frames, every=0.0) == [f"step {n}" for n in range(1, 100)]
    assert logged(*frames, every=1e9) == ["step 1", "step 99"]


def test_plain_lines_stay_and_escapes_go():
    text = b"one\r\n\ntwo\twords\n\x1b]0;title\x07three\x1b[31m!\x1b[0m\nrest"
    assert logged(text, every=0.0) == ["one", "", "two\twords", "three!", "rest"]


def test_what_a_killed_rank_has_printed_is_shown_and_logged(ranks, tmp_path, capfd):
    code, _ = ranks(
        """
        import sys
        print("out", rank, flush=True)
        print("err", rank, file=sys.stderr, flush=True)
        os.write(1, b"from below\\n")
        os.kill(os.getpid(), 9)
        """,
        processes=1,
    )
    assert code == -signal.SIGKILL
    out, err = capfd.readouterr()
    assert (out, err) == ("out 0\nfrom below\n", "err 0\n")
    assert sorted((tmp_path / "rank-0.log").read_text().splitlines()) == [
        "err 0",
        "from below",
        "out 0",
    ]


def test_a_process_that_keeps_the_output_open_holds_nobody_up(ranks, tmp_path):
    began = time.monotonic()
    pid = tmp_path / "pid"
    code, _ = ranks(
        f"""
        import subprocess
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
        open({str(pid)!r}, "w").write(str(child.pid))
        print("done")
        """,
        processes=1,
    )
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert code == 0
    assert time.monotonic() - began < 50
    assert (tmp_path / "rank-0.log").read_text() == "done\n"


LAUNCHER = (
    "import sys; from pathlib import Path\n"
    "from forescale.resilience.launcher import start_ranks\n"
    "sys.exit(start_ranks([sys.executable, '-c', sys.argv[1]], 1, Path(sys.argv[2]), print))\n"
)


def launch(snippet: str, folder: Path, **how) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", LAUNCHER, snippet, str(folder)], **how)


def test_on_a_terminal_rank_0_draws_its_line_and_the_log_has_lines(tmp_path):
    """A real pseudo-terminal, and the widget that the progress line is made of."""
    snippet = (
        "import os, sys, time\n"
        "from rich.progress import Progress, TextColumn\n"
        "assert sys.stdout.isatty() and sys.stderr.isatty()\n"
        "print('columns', os.get_terminal_size(1).columns)\n"
        "with Progress(TextColumn('{task.fields[text]}')) as shown:\n"
        "    task = shown.add_task('', text='starting')\n"
        "    for n in range(1, 4):\n"
        "        shown.update(task, text=f'step {n}', refresh=True)\n"
        "        shown.console.print(f'above {n}')\n"
    )
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 77, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    process = launch(snippet, tmp_path, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    screen = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the last process that had it is gone
            break
        if not data:
            break
        screen += data
    os.close(master)
    assert process.wait(60) == 0, screen
    assert b"\x1b[2K" in screen, "it is drawn anew"
    assert b"columns 77\r\n" in screen
    lines = (tmp_path / "rank-0.log").read_text().splitlines()
    assert [line for line in lines if "above" in line] == ["above 1", "above 2", "above 3"]
    assert lines[0] == "columns 77"
    assert lines[-1] == "step 3"
    assert "\x1b" not in "".join(lines)


def test_ranks_go_on_while_their_launcher_is_suspended(tmp_path):
    """More than a pipe holds is written meanwhile."""
    done, up = tmp_path / "done", tmp_path / "up"
    snippet = (
        "import time, pathlib\n"
        f"pathlib.Path({str(up)!r}).touch()\n"
        f"while not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.01)\n"
        "for n in range(40_000): print('x' * 99)\n"
        f"pathlib.Path({str(done)!r}).touch()\n"
    )
    process = launch(snippet, tmp_path, stdout=subprocess.DEVNULL)
    try:
        wait_for(up)
        process.send_signal(signal.SIGSTOP)
        (tmp_path / "go").touch()
        wait_for(done)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
        assert (tmp_path / "rank-0.log").stat().st_size == 40_000 * 100
    finally:
        process.kill()
        process.wait()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.mark.parametrize("closed", ["1", "2"])
def test_without_an_output_the_log_is_written(tmp_path, closed):
    words = ["sh", "-c", f'exec "$@" {closed}>&-', "sh", sys.executable, "-c", LAUNCHER]
    done = subprocess.run([*words, "print('here')", str(tmp_path)], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rank-0.log").read_text() == "here\n"
