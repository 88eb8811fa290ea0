"""Text of HTML pages: what a reader sees, in linear time, whatever the page holds."""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forescale.data.text.formats import text_of
from tests.trainer.data.read_files import read

PAGE = """<!DOCTYPE html><html><head><title>A &amp; B</title><style>p { x: "<b>" }</style>
<SCRIPT>if (a < b) f("</p>");</SCRIPT></head><body><!-- <p>no --><h1 class="x">Head</h1>
<p>One   <b>bold</b> word, 1 &lt; 2 and 3 < 4<br/>next&nbsp;line<ul><li>a<li>b</ul></body></html>
"""


def test_a_page_is_read_as_its_text(tmp_path):
    (tmp_path / "a.html").write_text(PAGE)
    documents, report = read(tmp_path / "a.html")
    text = "A & B\n\nHead\n\nOne bold word, 1 < 2 and 3 < 4\nnext\xa0line\n\na\nb\n"
    assert [(name, raw.decode()) for name, raw in documents] == [("a.html", text)]
    assert report.listed == {"markup removed": ["a.html"]}


def test_a_page_without_text_is_empty(tmp_path):
    (tmp_path / "a.htm").write_text("<p><!-- -->\n<br>")
    documents, report = read(tmp_path / "a.htm")
    assert (documents, report.counts) == ([], {"markup removed": 1, "empty": 1})


@given(st.text(alphabet="<>/!-abp &;'\"\nİ", max_size=60))
def test_any_page_gives_its_words(page):
    words = text_of(page).split()
    if "<" not in page:
        assert words == html.unescape(page).split()


@pytest.mark.parametrize(
    "part", ["<", "<!--", "<a '", "</", "<script>", "<style></", "<?", "&#", "<p ", "\n "]
)
def test_the_work_does_not_grow_with_the_square_of_the_page(part):
    """With a parser whose work does, this test doesn't end."""
    text_of(part * (200_000 // len(part)))
