"""Inputs of a build at a server: every file of a folder or glob, each as a stream of its bytes."""

import os
import random

import pytest

from forescale.ground.errors import UserError
from forescale.remote.listing import list_files, open_input
from tests.trainer.remote.remote_files import DATA, QUICK


@pytest.mark.parametrize(
    "faults",
    [
        ["well", "half", "reset", 503, "half_then_reset", "half_unsized"],
        ["whole", "half_then_reset", "whole"],
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*trying again")
def test_a_stream_continues_where_it_was_interrupted(server, faults):
    server.next_time("/d/a.tar", *faults)
    with open_input(f"{server.url}/d/a.tar", QUICK) as f:
        assert f.read() == DATA


def test_a_stream_can_seek(server):
    rng = random.Random(2)
    with open_input(f"{server.url}/d/a.tar", QUICK) as f:
        assert f.seek(0, os.SEEK_END) == len(DATA)
        assert f.read() == b""
        for _ in range(20):
            start, size = rng.randrange(len(DATA)), rng.randrange(300_000)
            assert f.seek(start) == start
            assert f.read(size) == DATA[start : start + size]
            assert f.tell() == min(start + size, len(DATA))


def test_a_seek_does_not_fetch_all_the_rest(server):
    server.files["/d/large"] = bytes(64 << 20)
    with open_input(f"{server.url}/d/large", QUICK) as f:
        f.seek(1 << 20)
        f.read(10)
    assert server.requests("/d/large")[-1] == (1 << 20, 5 << 20)


def test_a_stream_of_a_changing_file_is_reported(server):
    server.next_time("/d/a.tar", "well", "half")
    with open_input(f"{server.url}/d/a.tar", QUICK) as f:
        f.read(10)
        server.files["/d/a.tar"] = DATA[::-1]
        with pytest.raises(UserError, match="changed on the server between two requests"):
            f.read()


def test_a_web_folder_is_listed(server):
    server.files = {f"/w/{n}": b"x" for n in ("b.txt", "a.txt", "c.md", "x/d.txt", "x/y/e.txt")}
    base = f"{server.url}/w/"

    def names(pattern):
        return [name.removeprefix(base) for name, _ in list_files(base + pattern, QUICK)]

    server.next_time("/w/", "reset", 500)
    assert names("") == ["a.txt", "b.txt", "c.md", "x/d.txt", "x/y/e.txt"]
    assert names("*.txt") == ["a.txt", "b.txt"]
    assert names("x/*") == ["x/d.txt"]
    assert names("**/*.txt") == ["a.txt", "b.txt", "x/d.txt", "x/y/e.txt"]
    assert names("a.txt") == ["a.txt"]
    assert list_files(base + "c*", QUICK) == [(f"{base}c.md", None)]
    with pytest.raises(UserError, match="has no files"):
        names("*.json")
