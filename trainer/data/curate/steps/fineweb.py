"""`fineweb`: pages that are lists, menus or templates are dropped."""

from dataclasses import dataclass
from typing import ClassVar

from forescale.data.curate.step import Draft
from forescale.data.curate.steps.inputs import fractions
from forescale.data.curate.steps.prose import repeats, words

# Sentence_Terminal of Unicode, for the scripts of today. A quotation mark ends no sentence here.
_TERMINAL = ".?!‼‽⁇⁈⁉。！？．｡﹒﹖﹗।॥؟۔؞։።፧፨۔܀܁܂߹။၊។៕᠃᠉᙮᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿⸮꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫"


@dataclass(frozen=True)
class FineWeb:
    """Drops documents of which few lines end with a punctuation mark, most lines are short, or a
    part are lines that came before (Penedo et al. 2024, arXiv 2406.17557, section 3.6). Bounds are
    inclusive or not as in datatrove 0.10 (FineWebQualityFilter), and empty lines don't count."""

    VERSION: ClassVar[int] = 1
    SOURCE: ClassVar[str] = "Penedo et al. 2024, arXiv 2406.17557, 3.6; bounds as in datatrove 0.10"

    least_punctuated: float = 0.12  # section 3.6: of the lines, by their last character
    most_short: float = 0.67  # section 3.6: of the lines
    short_line: int = 30  # section 3.6: characters of a short line
    most_duplicate: float = 0.1  # section 3.6: characters of lines; datatrove, by default: 0.01
    most_line_ends: float | None = None  # a word; datatrove: 0.3, which section 3.6 doesn't name
    terminal: str = _TERMINAL  # datatrove: Unicode's Sentence_Terminal

    def check(self) -> None:
        names = ("least_punctuated", "most_short", "most_duplicate")
        fractions("fineweb", **{name: getattr(self, name) for name in names})

    def __call__(self, draft: Draft) -> str | None:
        text = draft.text
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if not lines:
            return "empty"
        marks = tuple(self.terminal)
        if sum(line.endswith(marks) for line in lines) / len(lines) < self.least_punctuated:
            return "few lines end with punctuation"
        if sum(len(line) <= self.short_line for line in lines) / len(lines) > self.most_short:
            return "short lines"
        line_ends = text.count("\n")
        if repeats(lines)[1] / (len(text) - line_ends) > self.most_duplicate:
            return "repeated lines"
        if self.most_line_ends is None:
            return None
        return "many line ends" if line_ends / len(words(text)) > self.most_line_ends else None
