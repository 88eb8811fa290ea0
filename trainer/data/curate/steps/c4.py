"""`c4`: lines that aren't sentences are cut out."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from forescale.data.curate.step import Draft
from forescale.data.curate.steps.inputs import entries

_ENDS = (".", "?", "!", '"')
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_POLICY = re.compile(
    "terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies"
)
_SENTENCE_END = re.compile(r"[.?!][\"'’”)\]]*(?!\S)")


@dataclass(frozen=True)
class C4:
    """Cuts out lines without an end mark, with few words or a very long one, about JavaScript or
    cookies, and marks of citations; drops documents with "lorem ipsum", a curly bracket, or few
    sentences (Raffel et al. 2020, JMLR 21(140), section 2.2, and their code, c4_utils.py of
    tensorflow_datasets). A sentence ends at . ? or ! before white space, where theirs asks NLTK's
    punkt. Both keep lines of 5 words and pages of 3 sentences, as ours does; datatrove 0.10, which
    FineWeb is made with, has 3 and 5 (so has curate=web), and lets an apostrophe end a line too.
    There is no list of bad words but the user's."""

    VERSION: ClassVar[int] = 1
    SOURCE: ClassVar[str] = "Raffel et al. 2020, JMLR 21(140), 2.2; tensorflow_datasets c4_utils.py"
    FILES: ClassVar[tuple[str, ...]] = ("bad_words",)

    end_marks: bool = True  # section 2.2; FineWeb: false
    least_words: int = 5  # of a line; section 2.2 (datatrove 0.10: 3)
    least_sentences: int = 3  # section 2.2 (datatrove 0.10: 5)
    longest_word: int = 1000  # characters; _MAX_WORD_LENGTH of c4_utils.py
    citations: bool = True  # [1], [edit] and [citation needed] are cut out; section 2.2
    lorem_ipsum: bool = True  # section 2.2
    javascript: bool = True  # section 2.2
    curly_bracket: bool = True  # section 2.2
    policy: bool = True  # section 2.2, with the phrases of c4_utils.py
    bad_words: str = ""  # a file with a word or phrase a line; section 2.2 has a list

    def check(self) -> None:
        if self.bad_words:
            entries("c4.bad_words", self.bad_words)

    def __call__(self, draft: Draft) -> str | None:
        bad_words = _bad_words(self.bad_words) if self.bad_words else None
        lines = []
        sentences = 0
        for whole_line in draft.text.splitlines():
            line = self._cleaned(whole_line)
            if line is None:
                continue
            lower = line.lower()
            if self.lorem_ipsum and "lorem ipsum" in lower:
                return "lorem ipsum"
            if self.javascript and "javascript" in lower:
                continue
            if self.curly_bracket and "{" in line:
                return "curly bracket"
            if self.policy and _POLICY.search(lower):
                continue
            if bad_words and bad_words.search(lower):
                return "bad word"
            # What is left at the end of a line is a sentence too.
            ends = [mark.end() for mark in _SENTENCE_END.finditer(line)]
            sentences += len(ends) + (not ends or ends[-1] < len(line))
            lines.append(line)
        if sentences < self.least_sentences:
            return "too few sentences"
        draft.text = "\n".join(lines).strip()
        return None

    def _cleaned(self, line: str) -> str | None:
        """Return a line without citations, None if it is cut out for its end or its words."""
        line = line.strip()
        if len(line) > self.longest_word and max(map(len, line.split())) > self.longest_word:
            return None
        if self.citations and "[" in line:
            line = _CITATION.sub("", line)
        if self.end_marks and (not line.endswith(_ENDS) or line.endswith("...")):
            return None
        return line if len(line.split(None, self.least_words)) >= self.least_words else None


@lru_cache(4)
def _bad_words(path: str) -> re.Pattern[str] | None:
    words = sorted({word.lower() for word in entries("c4.bad_words", path)})
    if not words:
        return None
    return re.compile(rf"(?<![a-z])(?:{'|'.join(map(re.escape, words))})(?![a-z])")
