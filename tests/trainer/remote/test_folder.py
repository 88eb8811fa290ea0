"""Copies in a folder elsewhere: read back before they count, found again, deleted. The store in
memory is fsspec's own; a real S3 server is in test_s3.py."""

import threading
from unittest.mock import Mock

import fsspec
import pytest

from forescale.ground.errors import UserError
from forescale.ground.foreign import SMALL
from forescale.ground.storage import hash_file
from forescale.remote.buckets import Folder, FsspecOrigin
from forescale.remote.transfer import RetryableError, Unreachable
from tests.trainer.remote.remote_files import QUICK


@pytest.fixture(params=["a directory", "memory://there"])
def folder(request, tmp_path):
    where = str(tmp_path / "there") if request.param == "a directory" else request.param
    yield Folder(where, QUICK)
    fsspec.filesystem("memory").store.clear()


def test_what_is_put_is_found_read_and_deleted(folder, tmp_path):
    assert folder.list() == {}
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    for name in ("a", "x/b", "x/y/c"):
        assert folder.put(name, tmp_path / "a") == hash_file(tmp_path / "a")
    assert folder.list() == {"a": 3000, "x/b": 3000, "x/y/c": 3000}
    assert b"".join(folder.get("x/b")) == b"abc" * 1000
    assert folder.has("x/b")
    assert not folder.has("b")
    folder.remove("a")
    folder.remove("a")
    folder.remove("x", recursive=True)
    folder.remove("x", recursive=True)
    assert folder.list() == {}


def test_a_file_is_created_once(folder):
    assert folder.read("x/a") is None
    assert folder.create("x/a", b"one")
    assert not folder.create("x/a", b"two")
    assert folder.read("x/a") == b"one"


def test_a_small_file_has_bounds_and_a_file_system_needs_links(folder, tmp_path, monkeypatch):
    (tmp_path / "large").write_bytes(bytes(SMALL + 1))
    folder.put("a", tmp_path / "large")
    with pytest.raises(UserError, match="more than"):
        folder.read("a")
    monkeypatch.setattr("os.link", Mock(side_effect=PermissionError(1, "not permitted")))
    with pytest.raises(UserError, match="without hard links"):
        Folder(str(tmp_path), QUICK).create("x", b"")
    assert [path.name for path in tmp_path.iterdir() if "x" in path.name] == []


def test_of_many_that_create_a_file_one_does(tmp_path):
    created, gate = [], threading.Barrier(8)

    def create(number):
        gate.wait()
        if Folder(str(tmp_path), QUICK).create("x/a", bytes([number]) * 1000):
            created.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (number,) = created
    assert (tmp_path / "x/a").read_bytes() == bytes([number]) * 1000
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a"]


def test_a_path_is_taken_as_it_is(tmp_path):
    """fsspec would write each of these files to `there`."""
    (tmp_path / "there").write_bytes(b"of somebody else")
    folder = Folder(str(tmp_path / "there::x#?%20*[y]"), QUICK)
    folder.put("c/d", tmp_path / "there")
    assert folder.list() == {"c/d": 16}
    folder.remove("c", recursive=True)
    assert (tmp_path / "there").read_bytes() == b"of somebody else"


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("s3://bucket/a::b", "has :: in it, which stands for a chain of addresses"),
        ("s3://$FORESCALE_SECRET_NOWHERE@bucket", "FORESCALE_SECRET_NOWHERE, which is not set"),
    ],
)
def test_an_address_that_can_not_be_used_is_not_tried_again(address, problem):
    with pytest.raises(UserError, match=problem) as caught:
        Folder(address, QUICK).list()
    assert "tried" not in str(caught.value)


def test_a_file_in_a_directory_is_replaced_as_a_whole(tmp_path):
    """A kill while a config was copied would leave half of it, and no way back."""
    folder = Folder(str(tmp_path / "there"), QUICK)
    (tmp_path / "a").write_bytes(b"old")
    folder.put("a", tmp_path / "a")
    (tmp_path / "a").write_bytes(b"new")
    with open(tmp_path / "there" / "a", "rb") as before:
        folder.put("a", tmp_path / "a")
        assert before.read() == b"old"
    assert folder.list() == {"a": 3}


def test_a_store_that_fails_for_a_moment_is_asked_again(folder, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"abc")
    folder.put("a", tmp_path / "a")
    ask, fails = FsspecOrigin.ask, [True]

    def answer(origin, timeout):
        if fails and fails.pop():
            raise RetryableError("503")
        ask(origin, timeout)

    monkeypatch.setattr(FsspecOrigin, "ask", answer)
    assert folder.has("a")
    assert not fails


def test_a_copy_that_differs_is_no_copy(folder, tmp_path, monkeypatch):
    """A store that loses the last byte: tried again, then an error that names it."""
    (tmp_path / "a").write_bytes(b"abc")
    monkeypatch.setattr(Folder, "get", lambda self, name: iter([b"ab"]))
    with pytest.raises(Unreachable, match="the copy of a differs from the file"):
        folder.put("a", tmp_path / "a")


def test_a_place_that_can_not_be_written_to_is_one_sentence(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    for where in (str(tmp_path / "a" / "below"), "nostore://x"):
        with pytest.raises(UserError):
            Folder(where, QUICK).put("a", tmp_path / "a")
