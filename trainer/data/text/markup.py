"""The text of an HTML page, without its markup.

Invariant: the time is linear in the length of the page, whatever it holds (html.parser of the
standard library needs minutes for 80 kB of `<a '`, and stops at some pages). A page that breaks the
rules of HTML gives some text, never an error.
"""

import html
import re
from collections.abc import Iterator

_HIDDEN = ("script", "style")  # elements whose content is no text
_BLOCK_NAMES = (
    "address article aside blockquote body br caption dd details div dl dt fieldset figcaption "
    "figure footer form h1 h2 h3 h4 h5 h6 head header hr html li main nav ol option p pre section "
    "summary table tbody td tfoot th thead title tr ul"
)
_BLOCKS = frozenset(_BLOCK_NAMES.split())
_NAME = re.compile(r"</?([a-zA-Z][a-zA-Z0-9]*)")
_SPACES = re.compile(r"[ \t\r\f\v]+")
_LINES = re.compile(r" ?\n[ \n]*\n ?")


def text_of(page: str) -> str:
    """Return the text of a page: a line for each block, one space for each run of spaces,
    characters for entities such as &amp;."""
    joined = _SPACES.sub(" ", html.unescape("".join(_pieces(page))))
    lines = _LINES.sub("\n\n", joined).replace(" \n", "\n").replace("\n ", "\n").strip()
    return f"{lines}\n" if lines else ""


def _pieces(page: str) -> Iterator[str]:
    """Yield the text between tags, and a line end for each tag of a block."""
    lower, at = page.lower(), 0
    if len(lower) != len(page):  # a few capitals become two characters
        lower = page
    endless: set[str] = set()  # ends that don't come any more: nothing is searched twice
    while (start := page.find("<", at)) >= 0:
        yield page[at:start]
        name, end = _NAME.match(lower, start), None
        if page.startswith("<!--", start):
            end = _after(lower, "-->", start + 4, endless)
        elif name and name[1] in _HIDDEN and lower[start + 1] != "/":
            opened = _after(lower, ">", start, endless)
            end = opened and _after(lower, f"</{name[1]}", opened, endless)
            end = end and _after(lower, ">", end, endless)
        if end is None and (name or page.startswith(("<!", "<?"), start)):
            end = _after(lower, ">", start, endless)
        if end is None:
            yield "<"
            at = start + 1
            continue
        if name and name[1] in _BLOCKS:
            yield "\n"
        at = end
    yield page[at:]


def _after(text: str, part: str, start: int, endless: set[str]) -> int | None:
    """Return the end of the next `part` from `start` on; None if there is none."""
    if part in endless:
        return None
    if (at := text.find(part, start)) < 0:
        endless.add(part)
        return None
    return at + len(part)
