"""Stores: a directory or a folder of a server; small files as a whole, large ones at any offset."""

import os
import sys

import pytest

from forescale.data.text.documents import ReadingReport
from forescale.data.text.files import find_files
from forescale.ground.errors import UserError
from forescale.remote.listing import list_files, open_input
from forescale.remote.store import Store
from forescale.remote.transfer import Missing
from tests.trainer.remote.remote_files import DATA, QUICK, SMALL, read, sentence


def test_a_local_file_is_read_at_any_offset(tmp_path):
    (tmp_path / "a").write_bytes(SMALL)
    file = Store(tmp_path).open("a", len(SMALL))
    assert file.size == len(SMALL)
    assert read(file, 17, 4711) == SMALL[17:4711]
    assert read(file, 0, 0) == b""
    assert file.forget(0, 10) is False
    file.will_read([(0, 10)])
    file.close()


@pytest.mark.parametrize(
    ("start", "stop", "size"), [(4990, 5001, 5000), (6000, 6010, 5000), (0, None, 100)]
)
def test_a_local_read_beyond_the_end_names_the_file(tmp_path, start, stop, size):
    (tmp_path / "a").write_bytes(SMALL)
    file = Store(tmp_path).open("a")
    os.truncate(tmp_path / "a", size)  # may shrink while it is open
    with pytest.raises(UserError, match=f"{tmp_path}/a: ends after {size:,} bytes, .* too early"):
        read(file, start, stop)


def test_errors_of_local_files_are_reported(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    store = Store(tmp_path)
    assert store.exists("a")
    assert not store.exists("b")
    for act in (store.open, store.read):
        with pytest.raises(UserError, match=f"{tmp_path}/b: is missing"):
            act("b")
    with pytest.raises(UserError, match="folder: is a directory"):
        read(store.open("folder"), 0, 1)
    with pytest.raises(UserError, match="a: has 1 bytes, expected 2"):
        store.open("a", 2)


def test_absolute_names_are_used_as_they_are(server, tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"there")
    local = Store(tmp_path / "d", tmp_path / "cache", 1 << 26, QUICK)
    remote = Store(f"{server.url}/d", tmp_path / "cache", 1 << 26, QUICK)
    for store in (local, remote):
        assert read(store.open(str(tmp_path / "elsewhere"))) == b"there"
        assert store.exists(str(tmp_path / "elsewhere"))
        assert read(store.open(f"{server.url}/d/small")) == SMALL
        assert store.exists(f"{server.url}/d/small")
        assert store.read(f"{server.url}/d/small") == SMALL


REFUSED = {
    "pipe:cat /etc/passwd": "which isn't allowed",
    "pipe://x": "which isn't allowed",
    "exec:ls": "which isn't allowed",
    "simplecache::s3://bucket/x": "which isn't allowed",
    "filecache::http://host/x": "which isn't allowed",
    "file:///etc/passwd": "isn't the address of a server; give the path without it",
    "local:///etc/passwd": "isn't the address of a server; give the path without it",
    "https://": "the server is missing",
}


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_that_are_refused(tmp_path, address):
    store = Store(tmp_path, tmp_path / "cache")
    acts = (Store, store.open, store.read, store.exists, list_files, open_input, find)
    for act in acts:
        with pytest.raises(UserError) as caught:
            act(address)
        assert REFUSED[address] in sentence(caught)


def find(address):
    return find_files(address, 0, ReadingReport())


def test_passwords_and_signatures_are_used_and_never_shown(server, tmp_path):
    url = server.url.replace("://", "://me:secret@") + "/d?signature=secret"
    store = Store(url, tmp_path, 1 << 26, QUICK)
    assert store.read("small") == SMALL
    with pytest.raises(Missing) as caught:
        store.read("nothing")
    assert "secret" not in str(caught.value) + store.where
    assert f"{server.url}/d/nothing?..." in str(caught.value)


def test_secrets_by_name_are_used_and_the_cache_outlives_them(server, tmp_path, monkeypatch):
    """Another signature of the same file is no other file."""
    address = server.url.replace("://", "://$FORESCALE_SECRET_LOGIN@") + "/d?$FORESCALE_SECRET_SAS"
    monkeypatch.setenv("FORESCALE_SECRET_LOGIN", "me:secret")
    store = Store(address, tmp_path, 1 << 26, QUICK)
    with pytest.raises(UserError, match="needs the environment variable FORESCALE_SECRET_SAS"):
        store.read("small")
    for signature in ("sig=one", "sig=two"):
        monkeypatch.setenv("FORESCALE_SECRET_SAS", signature)
        again = Store(address, tmp_path, 1 << 26, QUICK)
        assert again.read("small", len(SMALL), "v1") == SMALL
        assert signature not in again.where
    assert len(server.requests("/d/small")) == 1


# -- small files, and files of unknown size


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_small_files_are_read_whole(server, tmp_path):
    store = Store(f"{server.url}/d/", tmp_path / "cache", 1 << 26, QUICK)
    server.next_time("/d/small", "half", "reset", 500, "half_chunk")
    assert store.read("small") == SMALL
    assert store.read("empty") == b""
    assert store.exists("small")
    assert not store.exists("nothing")
    server.always("/d/small", 403)
    with pytest.raises(UserError, match="access denied"):
        store.exists("small")


def test_a_small_file_is_always_fetched_unless_its_version_is_known(server, tmp_path):
    store = Store(f"{server.url}/d", tmp_path / "cache", 1 << 26, QUICK)
    for _ in range(2):
        assert store.read("small") == SMALL
    assert len(server.log) == 2
    for _ in range(2):
        assert store.read("small", len(SMALL), "v1") == SMALL
    assert len(server.log) == 3


def test_an_unknown_size_is_requested(server, tmp_path):
    store = Store(f"{server.url}/d", tmp_path / "cache", 1 << 26, QUICK)
    file = store.open("a.tar")
    assert file.size == len(DATA)
    assert server.sent["/d/a.tar"] == 1
    assert store.open("empty").size == 0
    server.always("/d/small", "whole_unsized")
    with pytest.raises(UserError, match="doesn't report the file size"):
        store.open("small")


def test_a_read_beyond_the_end_names_the_file(server, tmp_path):
    file = Store(f"{server.url}/d", tmp_path, 1 << 26, QUICK).open("a.tar")
    with pytest.raises(UserError, match=r"a\.tar: ends after 3,000,000 bytes, 10 too early"):
        read(file, 2_999_990, 3_000_010)


def test_any_protocol_of_fsspec_is_read(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("b", "a", "x/c"):
        memory.pipe(f"/forescale-test/{name}", SMALL)
    store = Store("memory://forescale-test", tmp_path, 1 << 26, QUICK)
    assert store.exists("a")
    assert not store.exists("nothing")
    assert store.read("a") == SMALL
    assert read(store.open("x/c", len(SMALL), "v1"), 100, 200) == SMALL[100:200]
    with pytest.raises(UserError, match="b: has 5,000 bytes on the server, expected 4,999"):
        read(store.open("b", 4_999, "v1"))
    with pytest.raises(UserError, match="x: is a folder, not a file"):
        store.open("x")
    base = "memory://forescale-test"
    assert [name for name, _ in list_files(base)] == [f"{base}/a", f"{base}/b", f"{base}/x/c"]
    assert list_files(f"{base}/x/*") == [(f"{base}/x/c", len(SMALL))]
    with pytest.raises(Missing):
        store.read("nothing")
    with open_input(f"{base}/a") as f:
        f.seek(4000)
        assert f.read() == SMALL[4000:]


def test_a_missing_package_is_named_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install 'forescale\[gs\]'"):
        Store("gs://bucket/d", tmp_path).read("manifest.json")


def test_an_unknown_protocol_is_reported(tmp_path):
    with pytest.raises(UserError, match="magic://bucket"):
        Store("magic://bucket/d", tmp_path).read("manifest.json")
