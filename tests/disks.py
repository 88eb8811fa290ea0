"""Small disks for tests: they fill up, or turn read-only, for root too."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` (such as 1m) mounted at `path`. Skips the test where we may not mount."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs Linux and root")
    path.mkdir(exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "forescale-test", path],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"this machine doesn't let us mount a small disk: {made.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(path: Path, leave: int = 0) -> Path:
    """Fill the disk at `path` but for `leave` bytes, with one file; returns it."""
    file = path / "filling"
    file.write_bytes(bytes(leave))
    with open(path / "rest", "wb", buffering=0) as f:
        try:
            while f.write(bytes(4096)):
                pass
        except OSError:
            pass
    file.unlink()
    return (path / "rest").rename(file)


def make_read_only(path: Path) -> None:
    """Remount the small disk at `path` so that nobody can write to it."""
    subprocess.run(["mount", "-o", "remount,ro", path], check=True)
