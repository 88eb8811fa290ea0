"""What was foretold of a run, as the run itself reads it: a card, and the band that it ends in.

    studies/<name>/forecasts/0001.json    a card; scaling.forecast writes it, before its run is made
    a card -> its bands                   one where the run ends, one for each branch that decays
    a run -> its band                     the one of its own N and D, due at its last step alone

Invariant: a card counts only while the whole chain that it stands in does: each holds its own hash
and that of the one before. A band is of an annealed loss, so none is due before the end. Imports
no torch.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forescale.config.train import TrainJob
from forescale.errors import UserError
from forescale.models.config import ModelConfig
from forescale.models.flops import count
from forescale.storage import read_json, write_json

GENESIS = "0" * 64  # the hash before the first card
SAME = 0.01  # of log N and of log D: as near as that, two runs are of one point
_SIZES = ("blocks_and_head", "non_embedding", "total")  # conventions of N
_STUDIES = Path("studies")
_TODO = "give a card's path, such as studies/tiny/forecasts/0003.json, or STUDY/ID, such as tiny/3"


@dataclass(frozen=True)
class Card:
    path: Path
    facts: dict[str, Any]

    @property
    def id(self) -> str:
        return self.path.stem

    @property
    def outcome(self) -> dict[str, Any] | None:
        path = self.path.with_suffix(".outcome.json")
        return read_json(path) if path.exists() else None

    def came_out(self, name: str, loss: float) -> None:
        path = self.path.with_suffix(".outcome.json")
        if not path.exists():
            write_json(path, {"run": name, "loss": loss, "card": self.facts["hash"]})

    @property
    def bands(self) -> list["Band"]:
        """The end's first. Empty where it foretells no loss with intervals at an N and a D, as a
        law of FLOPs alone does."""
        f = self.facts
        try:
            own = ("loss", "interval_50", "interval")
            end = {"tokens": f["target"]["tokens"], **{name: f[name] for name in own}}
            found = [Band.of(self, point) for point in f.get("bands") or [end]]
        except (KeyError, TypeError, ValueError):
            return []
        return [b for b in found if all(0 < x < math.inf for x in (b.parameters, b.tokens, b.loss))]


@dataclass(frozen=True)
class Band:
    """Of a run of so many parameters, by the card's convention, that ends after `tokens`. loss: in
    nats a token, with its intervals of 50 % (inner) and of `level` (outer)."""

    card: Path
    hash: str
    parameters: float
    tokens: float
    loss: float
    inner: tuple[float, float]
    outer: tuple[float, float]
    level: float

    @classmethod
    def of(cls, card: Card, point: Mapping[str, Any]) -> "Band":
        """Of a point of a card. Raises KeyError, TypeError or ValueError where it is none."""
        f = card.facts
        n, d, loss = map(float, (f["target"]["parameters"], point["tokens"], point["loss"]))
        ends = _ends(point["interval_50"]), _ends(point["interval"])
        return cls(card.path, f["hash"], n, d, loss, *ends, float(f["level"]))

    def due(self, job: TrainJob) -> str:
        """What is said before the run begins."""
        low, high = self.outer
        doubt = "" if _decays(job) else ", but the run never decays: the law must be of such runs"
        return (
            f"Forecast {self.card.stem}: loss {self.loss:.4f} ({_percent(self.level)} {low:.4f} to "
            f"{high:.4f}) due at step {job.total_steps:,}{doubt}."
        )

    def judge(self, loss: float) -> dict[str, Any]:
        """How a held-out loss lies to it, as facts of an event. log_error: of foretold over
        observed, as a score has it."""
        observed = math.log(loss) if loss else -math.inf
        return {
            "card": str(self.card),
            "hash": self.hash,
            "foretold": self.loss,
            "observed": loss,
            "log_error": math.log(self.loss) - observed,
            "interval": list(self.outer),
            "level": self.level,
            "inside_50": self.inner[0] <= loss <= self.inner[1],
            f"inside_{100 * self.level:g}": self.holds(loss),
        }

    def holds(self, loss: float) -> bool:
        return self.outer[0] <= loss <= self.outer[1]  # not so of NaN


def told(facts: Mapping[str, Any]) -> str:
    """The facts of `Band.judge` as a sentence."""
    loss = math.nan if facts["observed"] is None else facts["observed"]  # a row has null for NaN
    low, high = facts["interval"]
    interval = f"its {_percent(facts['level'])} interval"
    place = f"inside {interval}" if low <= loss <= high else f"outside {interval}"
    return (
        f"Forecast {Path(facts['card']).stem}: loss {loss:.4f}, "
        f"{100 * (loss / facts['foretold'] - 1):+.2f} % of the forecast {facts['foretold']:.4f}, "
        f"{place}, {low:.4f} to {high:.4f}."
    )


def band_of(job: TrainJob) -> Band | None:
    """The band that the end of a run falls due in, None where it names no card; the sizes of its
    model must be known (start.settle). Raises UserError where there is no such card, where its
    chain is broken, where it has no band, and where it is of another N or D."""
    if job.forecast is None:
        return None
    card = find(job.forecast)
    if not (bands := card.bands):
        what = "foretells no loss with its intervals at an N and a D"
        raise UserError(str(card.path), what, "make a card by forescale study predict")
    _refuse_other_size(job, card, bands[0].parameters)
    tokens = job.total_steps * job.tokens_per_step
    near = min(bands, key=lambda band: abs(math.log(band.tokens / tokens)))
    if not _same(near.tokens, tokens):
        theirs = " and ".join(f"{band.tokens:,.0f}" for band in bands)
        what = f"{card.path} is of D = {theirs} tokens, and this run ends after {tokens:,}"
        raise UserError("forecast", what, "give the run's own card, or train as long as it says")
    return near


def find(name: str) -> Card:
    """The card at a path, or STUDY/ID under studies/. Raises UserError where there is none, or
    where its chain is broken."""
    study, _, number = name.rpartition("/")
    path = Path(name).expanduser()
    if study and number.isdigit():
        path = _STUDIES / study / "forecasts" / f"{int(number):04d}.json"
    if not path.is_file():
        raise UserError("forecast", f"there is no card {path}", _TODO)
    for card in cards(path.parent):
        if card.path == path:
            return card
    raise UserError("forecast", f"{path} is no card", _TODO)


def cards(folder: Path) -> list[Card]:
    """Oldest first, their chain verified. Raises UserError where it is broken."""
    names = sorted(p for p in folder.glob("*.json") if p.stem.isdigit())
    found, before = [], GENESIS
    for number, path in enumerate(names, 1):
        facts = read_json(path)
        if int(path.stem) != number:
            what = f"card {number:04d} is missing: forecasts were removed"
            raise UserError(str(folder), what, "restore it from a copy")
        if not _is_whole(facts, before):
            what = "was changed after it was written, or the card before it was"
            raise UserError(str(path), what, "restore it from a copy")
        found.append(Card(path, facts))
        before = facts["hash"]
    return found


def hash_of(facts: Mapping[str, Any]) -> str:
    """Of a card's facts but its own hash, in one way of writing them."""
    rest = {k: v for k, v in facts.items() if k != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _is_whole(facts: Any, before: str) -> bool:
    if not isinstance(facts, dict):
        return False
    return facts.get("hash") == hash_of(facts) and facts.get("before") == before


def _refuse_other_size(job: TrainJob, card: Card, wanted: float) -> None:
    """By the card's own convention; one of a table that counts by its own may be any of ours."""
    if not isinstance(job.model, ModelConfig):
        what = "the model is a class of your own, of unknown size: no card is of it"
        raise UserError("forecast", what, "take forecast= out")
    counts = count(job.model)
    said = str(card.facts.get("convention")).partition(",")[0].removeprefix("N ")
    names = (said,) if said in _SIZES else _SIZES
    ours = {name: getattr(counts, name) for name in names}
    if any(_same(n, wanted) for n in ours.values()):
        return
    has = ", ".join(f"{n:,} ({name})" for name, n in ours.items())
    what = f"{card.path} is of N = {wanted:,.0f}, and this run's model has {has}"
    raise UserError("forecast", what, "give the run's own card, or change the model")


def _same(a: float, b: float) -> bool:
    return abs(math.log(a / b)) < SAME


def _decays(job: TrainJob) -> bool:
    decay = job.schedule.decay
    return job.schedule.kind == "cosine" or bool(decay and job.steps_of(decay))


def _ends(interval: Any) -> tuple[float, float]:
    low, high = map(float, interval)
    return low, high


def _percent(level: float) -> str:
    return f"{100 * level:g} %"
