"""Standard output of a command with --json, as another process reads it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from forescale.ground.document import plain, taken_from
from forescale.ground.errors import CRASHED, DONE, INTERRUPTED, USER

BODY = """
import os, subprocess, sys, forescale.verbs.pin as pin
from forescale import cli
from forescale.ground.document import tell, tell_line
from forescale.ground.errors import UserError
def main(words):
    print("to people")
    os.write(1, b"past Python\\n")
    subprocess.run(["echo", "another process"])
    {body}
    return 0
pin.main = main
sys.exit(cli.main(["pin", "--json"]))
"""


def run(body: str) -> tuple[int, str, str]:
    command = [sys.executable, "-c", BODY.format(body=body)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_standard_output_holds_the_document_alone():
    code, out, err = run("tell({'a': 1}); tell({'b': float('nan')})")
    assert (code, json.loads(out)) == (DONE, {"a": 1, "b": None})
    assert all(text in err for text in ("to people", "past Python", "another process"))


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("raise UserError('a.yaml', 'is bad', 'mend it')", USER, ("a.yaml", "is bad", "mend it")),
        ("raise KeyboardInterrupt", INTERRUPTED, ("pin", "interrupted", None)),
        ("raise ZeroDivisionError('x')", CRASHED, ("pin", "ZeroDivisionError: x", None)),
        ("raise OSError(28, 'x', '/d/f')", USER, ("/d/f", "the disk is full", None)),
    ],
)
def test_a_failure_is_an_object_with_the_exit_code(body, code, error):
    got, out, err = run(f"tell({{'known': 1}}); {body}")
    document = json.loads(out)
    assert (got, document["known"], document["error"]["exit_code"]) == (code, 1, code)
    assert document["error"]["verb"] == "pin"
    parts = [document["error"][name] for name in ("subject", "problem", "todo")]
    assert all(want in (None, part) for want, part in zip(error, parts, strict=True))
    assert ("Traceback" in err) == (code == CRASHED)


def test_lines_are_printed_at_once_and_an_error_is_the_last():
    code, out, _ = run("tell_line({'n': 1}); tell_line({'n': 2}); raise UserError('a', 'b', 'c')")
    first, second, last = map(json.loads, out.splitlines())
    assert (code, first, second) == (USER, {"n": 1}, {"n": 2})
    assert last["error"]["subject"] == "a"


def test_a_reader_who_had_enough_is_no_fault():
    command = [sys.executable, "-c", BODY.format(body="tell({'a': 'x' * 1000000})")]
    reads, writes = os.pipe()
    process = subprocess.Popen(command, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    os.close(reads)
    assert process.stderr
    assert "Traceback" not in process.stderr.read()
    assert process.wait() == DONE


def test_which_words_ask_for_json():
    assert taken_from(["a", "--json", "b=1"]) == (["a", "b=1"], True)
    assert taken_from(["plan.json=true"]) == ([], True)
    assert taken_from(["json=true", "json=false"]) == ([], False)
    assert taken_from(["drill", "json=a.json"]) == (["drill", "json=a.json"], False)
    assert taken_from(["study", "--", "--json"]) == (["study", "--", "--json"], False)


def test_values_are_plain():
    values = {1: [math.inf], "a": np.float32(0.5), "b": np.arange(2), "c": Path("d"), "e": {1}}
    assert plain(values) == {"1": [None], "a": 0.5, "b": [0, 1], "c": "d", "e": [1]}
