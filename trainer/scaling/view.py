"""A study from Python: its records as a DataFrame, its fit, its predictions.

Invariant: the numbers are those that `forescale study` prints for the same keys.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forescale.config.compose import compose
from forescale.config.job import words_of
from forescale.ground.errors import UserError
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.config import StudyJob
from forescale.scaling.study.directory import settings
from forescale.scaling.study.inputs import read

if TYPE_CHECKING:
    import pandas as pd

    from forescale.scaling.analysis.prediction import Prediction
    from forescale.scaling.analysis.table_fit import StudyFit


class StudyView:
    """The runs of a study, or of others, and the law through them. records: one row a run; columns
    such as loss, parameters, tokens, flops, budget. where: how messages call them."""

    def __init__(self, keys: Mapping[str, Any]):
        self._keys = keys
        self.records: pd.DataFrame
        self.records, self.where = read(self._job({}))

    def __repr__(self) -> str:
        return f"StudyView({self.where!r})"

    def _job(self, keys: Mapping[str, Any]) -> StudyJob:
        words = words_of({**self._keys, **keys}, schema=StudyJob)
        return settings(compose(StudyJob, words), words)

    def fit(self, **keys: Any) -> "StudyFit":
        """Return the fit of the law: .fit.values, .fit.certificate, .replicates.errors, .doubts.
        keys: of `forescale study fit`, such as form="shared-exponent". Raises UserError if the runs
        determine no law."""
        return law_of(self.records, self._job(keys), self.where)

    def predict(self, **target: Any) -> "Prediction":
        """Return the predicted loss of a run: .loss, with .inner (50 %) and .outer (90 %). target:
        flops=, or parameters= and tokens=, as in target.* of `forescale study fit`. Raises
        UserError if they are missing, or the run is too far."""
        prediction = self.fit(target=target).predict()
        if prediction is None:
            raise UserError("target", "is not given", "write predict(flops=1e18)")
        return prediction


def open_view(source: str | Path, **keys: Any) -> StudyView:
    """Return the planned study of this name or directory, or the table or the runs of this name."""
    path = Path(source).expanduser()
    folder = path if "/" in str(source) else Path(str(keys.get("studies", "studies"))) / path
    if (folder / "plan.json").is_file():
        return StudyView({**keys, "study": folder.name, "studies": str(folder.parent)})
    return StudyView({**keys, "input": [str(source)]})
