"""Files are whole or absent, and any damage to a published directory is found."""

import errno
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.ground import storage
from forescale.ground.errors import UserError, storage_error
from forescale.ground.storage import (
    FileEntry,
    check_table,
    read_json,
    read_table,
    staged,
    write_file,
)
from tests import disks


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, broken):
    path = tmp_path / "config.yaml"
    write_file(path, b"old")
    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space") as caught:
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["config.yaml"]
    assert str(storage_error(caught.value)).count("the disk is full") == 1


def test_a_written_file_says_what_it_is(tmp_path):
    entry = write_file(tmp_path / "a", b"abc")
    assert entry == FileEntry(3, storage.hash_file(tmp_path / "a").sha256)
    assert (tmp_path / "a").read_bytes() == b"abc"


def test_a_stage_is_published_whole_or_leaves_nothing(tmp_path):
    final = tmp_path / "data"
    with pytest.raises(OSError, match="No space"), staged(final) as stage:
        full(write_file(stage / "half", b"1"))
    assert names(tmp_path) == []
    with staged(final) as stage:
        write_file(stage / "whole", b"2")
        assert not final.exists()
    assert names(tmp_path) == ["data"]
    assert names(final) == ["whole"]


def test_what_a_killed_try_left_is_removed(tmp_path):
    """In a process of its own, which ends without any clean-up."""
    final = tmp_path / "data"
    if (child := os.fork()) == 0:
        with staged(final) as stage:
            (stage / "half").write_bytes(b"1")
            os._exit(0)
    os.waitpid(child, 0)
    assert len(names(tmp_path)) == 1
    with staged(final) as stage:
        write_file(stage / "whole", b"2")
    assert names(tmp_path) == ["data"]
    assert names(final) == ["whole"]


def test_of_several_that_make_the_same_one_wins_and_no_other_is_harmed(tmp_path):
    """Each in a process, all at the same time, each with files of its own."""
    final, children = tmp_path / "data", []
    begin, gate = os.pipe()
    for number in range(4):
        if (child := os.fork()) == 0:
            try:
                os.close(gate)
                os.read(begin, 1)  # nothing comes: it ends when the gate is closed
                with staged(final) as stage:
                    for name in range(20):
                        (stage / str(name)).write_bytes(b"%d" % number)
                os._exit(0)
            except OSError as e:
                os._exit(3 if e.errno in (errno.ENOTEMPTY, errno.EEXIST) else 4)
        children.append(child)
    os.close(gate)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0, 3, 3, 3]
    winner = b"%d" % codes.index(0)
    assert names(tmp_path) == ["data"]
    assert [p.read_bytes() for p in final.iterdir()] == [winner] * 20


def test_the_stage_of_a_process_that_lives_is_left_alone(tmp_path):
    with staged(tmp_path / "data") as first:
        with staged(tmp_path / "other"):
            assert first.is_dir()
        with pytest.raises(OSError, match="No space"), staged(tmp_path / "data"):
            full()
        write_file(first / "whole", b"2")
    assert names(tmp_path / "data") == ["whole"]
    assert names(tmp_path) == ["data", "other"]


@pytest.mark.parametrize("value", [{"a": [1, 0.1, None, "é\udc80"], "b": {}}, {}])
def test_every_flipped_bit_of_a_checked_file_is_found(tmp_path, value):
    """But where it hides the checksum itself: then the content is as it was."""
    path = tmp_path / "run.json"
    storage.write_checked_json(path, value)
    assert read_json(path) == value
    assert storage.has_checksum(path)
    whole, hidden = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        harmed = bytearray(whole)
        harmed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(harmed)
        try:
            content = read_json(path)
        except UserError:
            continue
        hidden += 1
        assert list(content.items())[1:] == list(value.items())
        assert not storage.has_checksum(path)
    assert hidden <= 8 * len(storage.CHECKSUM)


def test_a_name_that_is_taken_stays(tmp_path):
    final = tmp_path / "data"
    final.mkdir()
    (final / "theirs").write_bytes(b"1")
    with pytest.raises(OSError, match="not empty"), staged(final):
        pass
    assert names(tmp_path) == ["data"]
    assert names(final) == ["theirs"]


@pytest.fixture
def published(tmp_path):
    """A directory of two files whose names are a bit apart."""
    folder = tmp_path / "published"
    with staged(folder) as stage:
        contents = {"rank-0.bin": b"\0\1\2", "rank-1.bin": b"\3\4"}
        storage.write_table(stage, {n: write_file(stage / n, c) for n, c in contents.items()})
    assert check_table(folder) == []
    return folder


def test_every_flipped_bit_is_found(published):
    """Of every file, the table included."""
    for path in published.iterdir():
        whole = path.read_bytes()
        for bit in range(8 * len(whole)):
            harmed = bytearray(whole)
            harmed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(harmed)
            faults = check_table(published)
            assert faults, f"bit {bit} of {path.name}: {harmed!r}"
            assert str(published) in faults[0]
        path.write_bytes(whole)
    assert check_table(published) == []


def test_every_truncation_and_every_missing_file_is_found(published):
    for path in published.iterdir():
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            # All of a table but its last newline still says everything.
            assert check_table(published) or (path.name, size) == ("files.json", len(whole) - 1)
        path.unlink()
        assert len(check_table(published)) == 1
        path.write_bytes(whole)


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_a_table_that_is_none_is_said_so(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("table")
    storage.write_json(folder / "files.json", value)
    if value == {}:
        assert read_table(folder) == {}
        return
    with pytest.raises(UserError, match=r"files\.json"):
        read_table(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
def test_a_table_that_names_a_path_outside_is_refused(tmp_path, name):
    storage.write_table(tmp_path, {name: FileEntry(1, "0" * 64)})
    with pytest.raises(UserError, match="outside its directory"):
        read_table(tmp_path)
    assert "outside its directory" in check_table(tmp_path)[0]


@pytest.mark.parametrize("text", ["", "{", '{"a": 1, "a": 2}', "\xff"])
def test_a_file_that_is_no_json_is_named(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"state\.json: not valid JSON") as caught:
        read_json(path)
    assert str(caught.value).count("\n") == 0
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "other.json")


def test_json_comes_back_and_equal_values_are_equal_bytes(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"x": "ü"}}
    assert storage.write_json(tmp_path / "a", value) == storage.write_json(tmp_path / "b", value)
    assert json.loads((tmp_path / "a").read_text()) == read_json(tmp_path / "b") == value


def test_a_full_disk_is_named_with_its_file(tmp_path):
    with disks.small_disk(tmp_path / "disk", "64k") as disk:
        write_file(disk / "a", b"old")
        with pytest.raises(OSError, match="No space left") as caught:
            write_file(disk / "a", bytes(1 << 20))
        fault = storage_error(caught.value)
        assert str(disk / ".a.") in str(fault)
        assert "the disk is full; free some space and run the same command again" in str(fault)
        assert names(disk) == ["a"]
        assert (disk / "a").read_bytes() == b"old"
        with pytest.raises(OSError, match="No space left"), staged(disk / "data") as stage:
            write_file(stage / "big", bytes(1 << 20))
        assert names(disk) == ["a"]


def test_a_file_can_be_read_from_the_storage_and_not_from_the_page_cache(tmp_path, monkeypatch):
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *arguments: advice.append(arguments))
    entry = write_file(tmp_path / "a", b"abc")
    assert storage.hash_file(tmp_path / "a") == entry
    assert advice == []
    assert storage.hash_file(tmp_path / "a", afresh=True) == entry
    assert advice == [(0, 0, os.POSIX_FADV_DONTNEED)]  # all of it


@pytest.mark.parametrize("sizes", [[], [1], [5_000_000] * 7, [0, 3, 1 << 22, 7]])
@pytest.mark.parametrize("most", [1, 1 << 23, 1 << 30])
def test_hashing_beside_the_writing_is_the_same(tmp_path, monkeypatch, sizes, most):
    monkeypatch.setattr(storage, "_MOST_UNHASHED", most)
    blocks = [bytes([n % 251]) * size for n, size in enumerate(sizes)]
    with storage.HashingFile(tmp_path / "a", beside=True) as f:
        for block in blocks:
            f.write(block)
        entry = f.finish()
    assert entry == storage.hash_file(tmp_path / "a")
    assert entry.size == sum(sizes)


def test_an_error_that_is_not_of_the_storage_gets_no_sentence():
    assert storage_error(OSError(errno.EPIPE, "Broken pipe")) is None


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a regular file; choose another path"):
        write_file(tmp_path / "pipe", b"x")
    assert (tmp_path / "pipe").is_fifo()
