"""Forecast files, and the prediction interval that a training run is compared with.

    studies/<name>/forecasts/0001.json    a forecast, written before its target run is trained
    a forecast -> prediction intervals    one for the end of the run, one for each earlier branch
    a run -> its prediction interval      the one of the run's own N and D, used after the last step
    a run -> its band                     that of its training loss by step, used while it trains

Invariant: a forecast is accepted only if the whole hash chain of its folder is intact: each file
holds its own hash and the hash of the file before it. The predicted losses are those of runs with a
decayed learning rate, so a held-out loss is compared only at the end; on the way the training loss
is, with the curve of runs of the same schedule. Imports no torch.
"""

# ruff: noqa: UP013 - the types of stored values, in as many lines as they need
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.ground.storage import read_json, read_typed, write_json
from forescale.ground.typed import AnyNumber, Count, Number, Positive, Share, typed
from forescale.models.config import ModelConfig
from forescale.models.flops import count
from forescale.run.band import Band

GENESIS = "0" * 64  # stands for the hash of the file before the first forecast
SAME = 0.01  # two runs are the same point if log N and log D differ by less than this
_SAME_DECAY = 0.03  # of the steps, by which the decays of two runs of one schedule may differ
Ends = tuple[AnyNumber, AnyNumber]
Rival = TypedDict("Rival", {"loss": AnyNumber})
Anew = TypedDict("Anew", {"share": Share, "loss": Positive, "low": Positive, "high": Positive})
Outcome = TypedDict("Outcome", {"run": str, "loss": AnyNumber, "anew": NotRequired[list[Anew]]})
_SIZES = ("blocks_and_head", "non_embedding", "total", "active")  # conventions of N
_STUDIES = Path("studies")
_TODO = (
    "give the path of a forecast, such as studies/tiny/forecasts/0003.json, or STUDY/ID, such as "
    "tiny/3"
)


# The content of a forecast file, which scaling/analysis/forecast.py writes. N and D of a target are
# NaN by a law of FLOPs alone; a task has no value if the data can't tell.
# fmt: off
_Target = TypedDict("_Target", {
    "run": str, "parameters": AnyNumber, "tokens": AnyNumber,
    "extrapolation_factor": NotRequired[AnyNumber],
})
_Task = TypedDict("_Task", {
    "column": str, "metric": str, "value": NotRequired[AnyNumber], "interval": NotRequired[Ends],
})
_Curve = TypedDict("_Curve", {
    "shares": list[Number], "above": list[Number], "deviation": list[Positive], "runs": Count,
    "schedule": str, "decay": Number,
})
_Point = TypedDict("_Point", {
    "tokens": AnyNumber, "loss": AnyNumber, "interval": Ends, "interval_50": Ends,
    "curve": NotRequired[_Curve],
})
_Facts = TypedDict("_Facts", {
    "target": _Target, "loss": Positive, "interval": Ends, "interval_50": Ends, "level": Share,
    "hash": str, "time": NotRequired[str], "rivals": NotRequired[dict[str, Rival]],
    "task": NotRequired[_Task], "points": NotRequired[list[_Point]],
})
# fmt: on


@dataclass(frozen=True)
class Forecast:
    """A forecast file. path: where it is stored; facts: its content."""

    path: Path
    facts: dict[str, Any]

    @property
    def id(self) -> str:
        """The number of the forecast as its file name has it, such as "0001"."""
        return self.path.stem

    @property
    def outcome(self) -> Outcome | None:
        """Return the recorded outcome, or None before there is one."""
        path = self.path.with_suffix(".outcome.json")
        return read_typed(Outcome, path) if path.exists() else None

    def record_outcome(
        self, name: str, loss: float, anew: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Write the observed loss of run `name` beside the forecast, unless one is recorded. anew:
        its events forecast_anew; those of this forecast are recorded too."""
        path = self.path.with_suffix(".outcome.json")
        if not path.exists():
            latest = {row["step"]: row for row in anew if row.get("hash") == self.facts["hash"]}
            ends = [{k: latest[step][k] for k in Anew.__annotations__} for step in sorted(latest)]
            facts = {"run": name, "loss": loss, "forecast": self.facts["hash"]}
            write_json(path, facts | ({"anew": ends} if ends else {}))

    @property
    def intervals(self) -> list["PredictionInterval"]:
        """Return the prediction intervals: that of the end of the run first, then the branches'.
        Empty if the forecast has no loss with intervals at an N and a D; a law of FLOPs alone
        predicts without them."""
        end = {**self.facts, "tokens": self.facts["target"]["tokens"]}
        points = self.facts.get("points") or [end]
        intervals = [PredictionInterval.of(self, point) for point in points]
        return [
            i for i in intervals if all(0 < x < math.inf for x in (i.parameters, i.tokens, i.loss))
        ]


@dataclass(frozen=True)
class PredictionInterval:
    """A predicted loss with its intervals, for a run of N `parameters` that ends after `tokens`.
    forecast, hash: path and hash of the forecast; parameters: N by the forecast's convention; loss:
    nats per token; inner: the 50 % interval; outer: the interval at `level`; curve: of the training
    loss above it, from runs of a schedule, see scaling/analysis/forecast.py."""

    forecast: Path
    hash: str
    parameters: float
    tokens: float
    loss: float
    inner: tuple[float, float]
    outer: tuple[float, float]
    level: float
    curve: _Curve | None = None

    @classmethod
    def of(cls, forecast: Forecast, point: Mapping[str, Any]) -> "PredictionInterval":
        """Read one of the forecast's `points`."""
        f = forecast.facts
        n, d, loss = map(float, (f["target"]["parameters"], point["tokens"], point["loss"]))
        ends = tuple(point["interval_50"]), tuple(point["interval"])
        curve = point.get("curve")
        return cls(forecast.path, f["hash"], n, d, loss, *ends, float(f["level"]), curve)

    def band(self, job: TrainJob) -> Band | None:
        """Return the band of the run's training loss; None if the forecast has no curve, or one of
        runs with another schedule."""
        decay, curve = job.decay_steps / job.total_steps, self.curve
        if curve is None or job.schedule.kind != curve["schedule"]:
            return None
        if abs(decay - curve["decay"]) > _SAME_DECAY:
            return None
        shape = curve["shares"], curve["above"], curve["deviation"]
        return Band(*shape, self.loss, *self.outer, self.level)

    def due_message(self, job: TrainJob) -> str:
        """Return the sentence that is printed before the run begins."""
        (low, high), doubt = self.outer, ""
        if job.schedule.kind != "cosine" and not job.has_decay:
            doubt = "; the learning rate of this run never decays, so the law must be of such runs"
        return (
            f"Forecast {self.forecast.stem}: loss {self.loss:.4f} expected at step "
            f"{job.total_steps:,} ({_percent(self.level)} interval {low:.4f} to {high:.4f}){doubt}."
        )

    def compare(self, loss: float) -> dict[str, Any]:
        """Compare an observed held-out loss with the prediction; return the facts of an event.
        log_error: log of predicted over observed loss, as in scores of forecasts."""
        observed = math.log(loss) if loss else -math.inf
        return {
            "forecast": str(self.forecast),
            "hash": self.hash,
            "predicted": self.loss,
            "observed": loss,
            "log_error": math.log(self.loss) - observed,
            "interval": list(self.outer),
            "level": self.level,
            "inside_50": self.inner[0] <= loss <= self.inner[1],
            f"inside_{100 * self.level:g}": self.contains(loss),
        }

    def contains(self, loss: float) -> bool:
        """Return True if the outer interval contains `loss`; False for NaN."""
        return self.outer[0] <= loss <= self.outer[1]


def describe(facts: Mapping[str, Any]) -> str:
    """Return the facts of `PredictionInterval.compare` as a sentence."""
    loss = math.nan if facts["observed"] is None else facts["observed"]  # JSON has null for NaN
    low, high = facts["interval"]
    interval = f"the {_percent(facts['level'])} interval"
    place = f"inside {interval}" if low <= loss <= high else f"outside {interval}"
    return (
        f"Forecast {Path(facts['forecast']).stem}: observed loss {loss:.4f}, "
        f"{100 * (loss / facts['predicted'] - 1):+.2f} % from the predicted "
        f"{facts['predicted']:.4f}, {place} {low:.4f} to {high:.4f}."
    )


def prediction_interval_of(job: TrainJob) -> PredictionInterval | None:
    """Return the prediction interval for the end of a run, or None if the job names no forecast.
    The sizes of the job's model must be known (start.settle). Raises UserError if there is no such
    forecast, if its hash chain is broken, if it has no prediction interval, or if it is for another
    N or D than the run's."""
    if job.forecast is None:
        return None
    forecast = find(job.forecast)
    if not (intervals := forecast.intervals):
        problem = "predicts no loss with intervals at an N and a D"
        raise UserError(str(forecast.path), problem, "make a forecast with forescale study predict")
    _refuse_other_size(job, forecast, intervals[0].parameters)
    tokens = job.total_tokens
    near = min(intervals, key=lambda i: abs(math.log(i.tokens / tokens)))
    if not _same(near.tokens, tokens):
        lengths = " and ".join(f"{i.tokens:,.0f}" for i in intervals)
        problem = f"{forecast.path} is for D = {lengths} tokens, but this run ends after {tokens:,}"
        raise UserError("forecast", problem, "give the forecast of this run, or change its length")
    return near


def find(name: str) -> Forecast:
    """Return the forecast at a path, or the one named STUDY/ID under studies/. Raises UserError if
    there is none, or if its hash chain is broken."""
    study, _, number = name.rpartition("/")
    path = Path(name).expanduser()
    if study and number.isdigit():
        path = _STUDIES / study / "forecasts" / f"{int(number):04d}.json"
    if not path.is_file():
        raise UserError("forecast", f"there is no forecast {path}", _TODO)
    for forecast in read_forecasts(path.parent):
        if forecast.path == path:
            return forecast
    raise UserError("forecast", f"{path} is no forecast", _TODO)


def read_forecasts(folder: Path) -> list[Forecast]:
    """Return the forecasts in a folder, oldest first, after verifying their hash chain. Raises
    UserError if a forecast is missing or was changed."""
    names = sorted(p for p in folder.glob("*.json") if p.stem.isdigit())
    forecasts, previous = list[Forecast](), GENESIS
    for number, path in enumerate(names, 1):
        facts = read_json(path)
        if int(path.stem) != number:
            problem = f"forecast {number:04d} is missing"
            raise UserError(str(folder), problem, "restore it from a copy")
        hashes = (hash_of(facts), previous) if isinstance(facts, dict) else ()
        if not hashes or hashes != (facts.get("hash"), facts.get("previous_hash")):
            problem = "this forecast, or the one before it, was changed after it was written"
            raise UserError(str(path), problem, "restore it from a copy")
        typed(_Facts, facts, str(path))
        forecasts.append(Forecast(path, facts))
        previous = facts["hash"]
    return forecasts


def hash_of(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a forecast's facts without "hash" itself, as JSON with sorted keys."""
    rest = {k: v for k, v in facts.items() if k != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _refuse_other_size(job: TrainJob, forecast: Forecast, size: float) -> None:
    """Raise UserError if the model's N, by the forecast's convention, is not `size`. If the
    forecast is of a table with its own convention, any of ours may match."""
    if not isinstance(job.model, ModelConfig):
        problem = "the size of such a model class is unknown, so no forecast applies to it"
        raise UserError("forecast", problem, "leave out forecast=")
    counts = count(job.model)
    named = str(forecast.facts.get("convention")).partition(",")[0].removeprefix("N ")
    names = (named,) if named in _SIZES else _SIZES
    sizes = {name: getattr(counts, name) for name in names}
    if any(_same(n, size) for n in sizes.values()):
        return
    if counts.active == counts.total - counts.mtp and len(names) > 1:
        del sizes["active"]  # as of every model without experts
    has = ", ".join(f"{n:,} ({name})" for name, n in sizes.items())
    problem = f"{forecast.path} is for N = {size:,.0f}, but this run's model has {has}"
    raise UserError("forecast", problem, "give the forecast of this run, or change the model")


def _same(a: float, b: float) -> bool:
    return abs(math.log(a / b)) < SAME


def _percent(level: float) -> str:
    return f"{100 * level:g} %"
