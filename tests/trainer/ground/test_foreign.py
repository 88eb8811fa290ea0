"""Only regular files within bounds are read: nothing waits, nothing fills the memory."""

import json
import os
import socket
import subprocess

import pytest

from forescale.ground.errors import UserError
from forescale.ground.foreign import parse_json, read_bytes, read_object, read_text


def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # the path of a socket has at most 107 bytes
        listener.bind("socket")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    kinds = {"pipe": "a pipe", "socket": "a socket", "zero": "a device", ".": "a directory"}
    kinds |= {"loop": "symbolic links", "gone": "no such file", "a\0b": "no path"}
    for name, kind in kinds.items():
        with pytest.raises(UserError, match=kind):
            read_bytes(f"{tmp_path}/{name}")


def test_what_a_command_writes_is_read_to_its_end():
    """As of template=<(command): it may write late."""
    with subprocess.Popen(["bash", "-c", "echo a; sleep 0.2; echo b"], stdout=-1) as command:
        assert read_text(f"/dev/fd/{command.stdout.fileno()}") == "a\nb\n"


def test_a_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"caf\xe9")
    assert read_bytes(tmp_path / "a", 4) == b"caf\xe9"
    with pytest.raises(UserError, match="more than 3 bytes"):
        read_bytes(tmp_path / "a", 3)
    with pytest.raises(UserError, match=r"UTF-8 \(byte 3\)"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize("text", ["[1]", '{"a": "\\ud800"}', '{"\\udfff": 1}'])
def test_an_object_is_one_whose_texts_can_be_written(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json: (is not|holds half)"):
        read_object(tmp_path / "a.json")


def test_json_is_a_tree_that_can_be_walked():
    deep: list = []
    for _ in range(99):
        deep = [deep]
    assert parse_json(json.dumps({"a": [1, {"b": None}]}), "x") == {"a": [1, {"b": None}]}
    assert parse_json(json.dumps(deep), "x") == deep
    for text in (json.dumps([deep]), "[" * 10**6, '{"a": 1, "a": 2}', "1" * 5000, b"\xff"):
        with pytest.raises(UserError, match="x: not valid JSON"):
            parse_json(text, "x")
