"""`repair`: broken characters are made whole."""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from forescale.data.curate.step import Draft
from forescale.data.curate.steps.inputs import package

_PIECE = 100_000  # characters of a line that are repaired at once
# Controls, line and paragraph separators, surrogates, and what ftfy counts as controls.
_SPECIAL = re.compile(
    r"[\x00-\x08\x0b\r-\x1f\x7f-\x9f\u2028\u2029\u206a-\u206f\ud800-\udfff\ufeff\ufff9-\uffff]"
)
_PLAIN = re.compile(r"[\t\n\f\x20-\x7e]*")


@lru_cache(4)
def _config(entities: bool, normalization: str) -> Any:
    """Return the settings of ftfy: datatrove's FTFYFormatter, with line ends and a normal form."""
    return package("repair", "ftfy").TextFixerConfig(
        unescape_html="auto" if entities else False,
        fix_latin_ligatures=False,  # these three change good text
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=True,
        normalization=normalization or None,
        max_decode_length=_PIECE,
        explain=False,
    )


@dataclass(frozen=True)
class Repair:
    r"""Changes broken characters, drops nothing: UTF-8 read as another encoding (mojibake),
    control characters, terminal escapes, lone surrogates, line ends (\r\n, \r and U+2028 become
    \n), and the normal form NFC. The rules are those of the package ftfy 6.3 (Speer 2019)."""

    VERSION: ClassVar[int] = 1
    SOURCE: ClassVar[str] = "ftfy 6.3; settings of datatrove 0.10 (FTFYFormatter), with NFC"

    entities: bool = False  # HTML entities, such as &amp;; FineWeb: true, but source code has them
    normalization: str = "NFC"  # "" leaves the normal form; FineWeb: ""

    def packages(self) -> tuple[str, ...]:
        return ("ftfy",)

    def __call__(self, draft: Draft) -> str | None:
        ftfy = package("repair", "ftfy")
        config = _config(self.entities, self.normalization)
        if self.entities and "&" in draft.text:
            draft.text = ftfy.fix_text(draft.text, config)
            return None
        # ftfy looks at each line by itself, for 20 microseconds.
        lines = draft.text.split("\n")
        lines = [line + "\n" for line in lines[:-1]] + lines[-1:]
        for i, line in enumerate(lines):
            lines[i] = line[:-2] + "\n" if line.endswith("\r\n") else line
            if not self._is_whole(lines[i]):
                lines[i] = ftfy.fix_text(line, config)
        draft.text = "".join(lines)
        return None

    def _is_whole(self, line: str) -> bool:
        """Return whether ftfy surely leaves a line as it is: it looks for mojibake only where its
        `is_bad` says so."""
        if _PLAIN.fullmatch(line):
            return True
        if _SPECIAL.search(line) or package("repair", "ftfy.badness").is_bad(line):
            return False
        form: Any = self.normalization
        return not form or unicodedata.is_normalized(form, line)
