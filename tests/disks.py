"""Small disks for tests of full and read-only disks; they work for root too."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of `size` (such as 1m) at `path`. Skips the test if mounting isn't allowed."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs Linux and root")
    path.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "forescale-test", path],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk isn't allowed here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(path: Path, leave: int = 0) -> Path:
    """Fill the disk at `path` except for `leave` bytes, with one file; return the file."""
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
    """Remount the small disk at `path` as read-only."""
    subprocess.run(["mount", "-o", "remount,ro", path], check=True)
