"""`classifier`: documents to which a model of the user gives a low score are dropped."""

import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from math import isnan
from pathlib import Path
from typing import Any, ClassVar

from forescale.data.curate.step import Draft
from forescale.data.curate.steps.inputs import FASTTEXT, LABEL, labels, package
from forescale.ground.errors import UserError


@dataclass(frozen=True)
class Classifier:
    """Drops documents with a score below `threshold`, and stores the score as an attribute. The
    score is the probability of `label` by a fastText model (a .bin or .ftz file), or what an object
    of the class `target` returns for the text; each process makes one, without arguments. Give the
    class another name when it changes: a dataset is known by it."""

    VERSION: ClassVar[int] = 1
    SOURCE: ClassVar[str] = "a model of the user"
    FILES: ClassVar[tuple[str, ...]] = ("model",)

    model: str = ""  # a file of fastText
    label: str = ""  # with or without __label__
    target: str = ""  # mypackage.MyClass, instead of model and label
    threshold: float = 0.5  # no published value: it depends on the model
    attribute: str = "score"

    def check(self) -> None:
        if bool(self.model) == bool(self.target):
            raise UserError("classifier", "needs one of model and target", "give one of them")
        if self.target:
            _object(self.target)
            return
        names = labels(_model(self.model))
        if self.label.removeprefix(LABEL) not in names:
            problem = f"{self.model} has no label {self.label!r}"
            todo = f"choose one of {', '.join(names[:20])}"
            raise UserError("classifier.label", problem, todo)

    def packages(self) -> tuple[str, ...]:
        return FASTTEXT if self.model else ()

    def __call__(self, draft: Draft) -> str | None:
        score = self._score(draft.text)
        draft.attributes[self.attribute] = score
        return None if score >= self.threshold else "low score"

    def _score(self, text: str) -> float:
        if self.target:
            try:
                score = float(_object(self.target)(text))
            except UserError:
                raise
            except Exception as e:  # the user's code
                problem = f"{self.target} failed on a text ({e!r})"
                raise UserError("classifier.target", problem, "return a number for each") from e
            if isnan(score):
                problem = f"{self.target} returned NaN, which is no score"
                raise UserError("classifier.target", problem, "return a number for each text")
            return score
        # fastText reads one line.
        line = text.encode("utf-8", "ignore").decode().replace("\n", " ").replace("\0", " ")
        label = LABEL + self.label.removeprefix(LABEL)
        names, probabilities = _model(self.model).predict(line, k=-1)
        scores = dict(zip(names, probabilities, strict=True))
        return round(float(scores.get(label, 0.0)), 6)


@lru_cache(4)
def _model(path: str) -> Any:
    fasttext = package("classifier", "fasttext")
    if not Path(path).is_file():
        raise UserError("classifier.model", f"there is no file {path}", "check the path")
    try:
        return fasttext.load_model(path)
    except (ValueError, RuntimeError) as e:
        problem = f"{path} is not a model of fastText ({e})"
        raise UserError("classifier.model", problem, "give its .bin or .ftz file") from None


@lru_cache(4)
def _object(target: str) -> Any:
    module, _, name = target.rpartition(".")
    if (here := os.getcwd()) not in sys.path:  # last, as for all classes of the user
        sys.path.append(here)
    try:
        scorer = getattr(import_module(module), name)()
    except Exception as e:  # the user's code
        problem = f"can't make an object of {target} ({e!r})"
        todo = "write package.module.Class, and run the command in the directory that contains it"
        raise UserError("classifier.target", problem, todo) from e
    if not callable(scorer):
        problem = f"an object of {target} can't be called with a text"
        raise UserError("classifier.target", problem, "give it a method __call__")
    return scorer
