"""YAML that anybody may have written: read, or refused with a sentence."""

import pytest

from forescale.config.yaml_text import read_yaml
from forescale.ground.errors import UserError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{one}: &{one} [{', '.join([f'*{before}'] * 9)}]\n"
    for one, before in zip("bcdefghi", "abcdefgh", strict=True)
)


def test_anchors_are_read():
    assert read_yaml(b"a: &a {b: 1}\nc: *a\n", "f") == {"a": {"b": 1}, "c": {"b": 1}}
    assert read_yaml(b"", "f") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "f: is too large with its anchors written out"),
        ("a: &a [*a]", "f: is too large with its anchors written out"),
        ("a: " + "[" * 5000, "f: is nested too deeply"),
        ("a: {" * 2000, "f: is nested too deeply"),
        ("a: 1\nb: [", "f, line 2: is not valid YAML"),
        ("a: 2026-99-99", "f: is not valid YAML"),  # a date that there is not
        ("a: " + "9" * 5000, "f: is not valid YAML"),
        ("a: !!python/object:os.system x", "f, line 1: is not valid YAML"),
        ("a: \udcff", "f: is not valid YAML"),
    ],
)
def test_a_file_that_nobody_needs_is_refused(text, words):
    with pytest.raises(UserError) as error:
        read_yaml(text.encode(errors="surrogateescape"), "f")
    assert str(error.value).startswith(words)
