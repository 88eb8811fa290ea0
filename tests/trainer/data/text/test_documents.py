"""Faulty, blank and long text: each policy works as documented, and everything is counted."""

import pytest

from forescale.data.text.documents import Intake, Policy, ReadingReport
from forescale.ground.errors import UserError


def take(text, **policy):
    chosen, report = Policy(**policy), ReadingReport()
    chosen.check()
    return [d.text for d in Intake(report, chosen).documents("a", text)], report.as_dict()


def counted(reason, name="a"):
    return {reason: {"count": 1, "first": [name]}}


def test_valid_text_is_kept_unchanged():
    text = "Füße\r\n\x00 end ".encode()
    assert take(text) == ([text], {})
    assert take(text.decode()) == ([text], {})


def test_undecodable():
    assert take(b"ab\xff\xfecd") == ([], counted("undecodable", "a (byte 2)"))
    replaced = counted("undecodable, replaced", "a (byte 2)")
    assert take(b"ab\xff\xc3cd", undecodable="replace") == (["ab\ufffd\ufffdcd".encode()], replaced)
    with pytest.raises(UserError, match=r"a: isn't UTF-8 \(byte 2\)"):
        take(b"ab\xff", undecodable="fail")


def test_half_a_surrogate_pair_is_undecodable_too():
    halved = "a (half a surrogate pair)"
    assert take("x\ud800y") == ([], counted("undecodable", halved))
    documents = take("x\ud800y\ud83d", undecodable="replace")
    assert documents == (["x\ufffdy\ufffd".encode()], counted("undecodable, replaced", halved))
    with pytest.raises(UserError, match="half a surrogate pair"):
        take("\udfff", undecodable="fail")


@pytest.mark.parametrize("blank", [b"", b" \n\t\r\n", "", "  "])
def test_blank(blank):
    assert take(blank) == ([], counted("empty"))
    with pytest.raises(UserError, match="a: holds no text"):
        take(blank, empty="fail")


def test_long():
    text = "1234ü6".encode()  # 7 bytes
    assert take(text, long="cut", max_document_bytes=7) == ([text], {})
    assert take(text, long="cut", max_document_bytes=6) == (
        ["1234ü".encode()],
        counted("long, cut"),
    )
    # The limit falls into the middle of the character.
    assert take(text, long="cut", max_document_bytes=5) == ([b"1234"], counted("long, cut"))
    assert take(text, long="skip", max_document_bytes=6) == ([], counted("long"))
    with pytest.raises(UserError, match="a: is longer than 6 bytes"):
        take(text, long="fail", max_document_bytes=6)


def test_text_beyond_the_limit_is_not_examined_and_before_it_it_is():
    cut = {"long": "cut", "max_document_bytes": 4}
    assert take(b"1234567\xff", **cut) == ([b"1234"], counted("long, cut"))
    assert take(b"12\xff4567", **cut) == (
        [],
        counted("long, cut") | counted("undecodable", "a (byte 2)"),
    )
    both = counted("long, cut") | counted("undecodable, replaced", "a (byte 2)")
    assert take(b"12\xff4567", undecodable="replace", **cut) == ([b"12"], both)
    assert take(b"\x80" * 9, **cut)[0] == []  # nothing in it ends a character


def test_the_text_left_after_a_cut_may_be_blank():
    documents, report = take("  ü", long="cut", max_document_bytes=3)
    assert documents == []
    assert report == counted("long, cut") | counted("empty")


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (
            {"undecodable": "keep"},
            "undecodable: 'keep' isn't a valid policy; choose skip or replace or fail",
        ),
        ({"empty": "cut"}, "empty: 'cut' isn't a valid policy"),
        ({"long": "replace"}, "long: 'replace' isn't a valid policy"),
        ({"long": "cut"}, "max_document_bytes: must be at least 1 with long=cut"),
        (
            {"long": "skip", "max_document_bytes": 0},
            "max_document_bytes: must be at least 1 with long=skip",
        ),
        ({"max_document_bytes": 5}, "max_document_bytes: 5 has no effect"),
    ],
)
def test_invalid_policies(policy, sentence):
    with pytest.raises(UserError, match=sentence):
        Policy(**policy).check()


def test_merged_reports_equal_the_report_of_the_whole():
    whole, merged = ReadingReport(), ReadingReport()
    for part in range(5):
        report = ReadingReport()
        for number in range(90):
            for r in (whole, report):
                r.add("empty" if number % 3 else "malformed", f"{part}-{number}")
        merged.merge(report)
    assert merged.as_dict() == whole.as_dict()
    assert merged.counts == {"empty": 300, "malformed": 150}
    assert len(merged.listed["empty"]) == 200
