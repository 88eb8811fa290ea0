"""The objectives: what the project must know of each, and the config section.

To add an objective, write a file in data/objectives/ with its class (see data/objective.py for the
protocol) and a line in OBJECTIVES here. Invariant: imports no torch.
"""

# ruff: noqa: RUF009 (key makes fields, as dataclasses.field does)

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from forescale.config.job import Problems
from forescale.config.schema import TargetConfig, key
from forescale.config.suggest import nearest_first

if TYPE_CHECKING:
    from forescale.config.train import TrainJob


@dataclass(frozen=True)
class ObjectiveSpec:
    """What the rest of the project must know about an objective.

    name: the dotted name of its class.
    sees_both_sides: whether its model is an encoder, with model.causal=false.
    continues_text: whether its model can continue a text, and its losses are those of a text.
    source: what the source is, where a row is a source and a target, and the class has `split`, the
        number of its columns: gaps, a text that lacks spans; start, that of a text; prompt, a text
        of its own, with an answer.
    targets: what a target is, in words for people.
    shortest: the fewest columns of a row with a target.
    whole: whether rows are whole documents, which a table finds, and no windows.
    rows: how many rows a window becomes.
    settings: the keys of this section that are arguments of its class, with their names there.
    """

    name: str
    sees_both_sides: bool = False
    continues_text: bool = True
    source: str = ""
    targets: str = "tokens"
    shortest: int = 1
    whole: bool = False
    rows: int = 1
    settings: tuple[tuple[str, str], ...] = ()


OBJECTIVES = {
    "next_token": ObjectiveSpec("forescale.data.objective.NextToken"),
    "masked": ObjectiveSpec(
        "forescale.data.objectives.masked.MaskedTokens",
        sees_both_sides=True,
        continues_text=False,
        targets="masked tokens",
        settings=(
            ("masked_rate", "rate"),
            ("masked_hidden", "hidden"),
            ("masked_random", "random"),
        ),
    ),
    "seq2seq": ObjectiveSpec(
        "forescale.data.objectives.spans.Spans",
        continues_text=False,
        source="gaps",
        targets="tokens of spans",
        shortest=4,  # a token, a span of one, and two sentinels
        settings=(("spans_rate", "rate"), ("spans_mean", "mean")),
    ),
    "prefix": ObjectiveSpec(
        "forescale.data.objectives.prefix.Prefix",
        continues_text=False,
        source="start",
        targets="tokens after the source",
        shortest=2,
        settings=(("prefix_share", "share"),),
    ),
    "pairs": ObjectiveSpec(
        "forescale.data.objectives.pairs.Pairs",
        continues_text=False,
        source="prompt",
        targets="tokens of answers",
        shortest=2,
        whole=True,
        settings=(("pairs_separator", "separator"), ("pairs_source", "source")),
    ),
    "responses": ObjectiveSpec(
        "forescale.data.objectives.responses.Responses",
        targets="tokens of responses",
        whole=True,
    ),
    "preferences": ObjectiveSpec(
        "forescale.data.objectives.preferences.Preferences",
        targets="preferences",
        whole=True,
        rows=2,
        settings=(("beta", "beta"),),
    ),
}


@dataclass
class ObjectiveConfig:
    kind: str = key("next_token", f"what is learned: {', '.join(OBJECTIVES)}, or own")
    masked_rate: float = key(0.15, "masked: share of the tokens that are targets", gt=0, lt=1)
    masked_hidden: float = key(
        0.8, "masked: share of the targets that the mask token replaces in the inputs", ge=0, le=1
    )
    masked_random: float = key(
        0.1, "masked: share that a random token replaces; all other targets stay", ge=0, le=1
    )
    spans_rate: float = key(0.15, "seq2seq: share of the tokens that spans take out", gt=0, lt=1)
    spans_mean: float = key(3.0, "seq2seq: mean length of a span, in tokens", ge=1)
    prefix_share: float = key(0.5, "prefix: share of the tokens that are the source", gt=0, lt=1)
    pairs_separator: str | None = key(
        None,
        r"pairs: the token between source and target of each document: its text, such as \t, or "
        "its id",
    )
    pairs_source: int | None = key(
        None, "pairs: columns of the source; null: half of train.sequence_length", ge=1
    )
    beta: float = key(
        0.1,
        "preferences: how much a change of a response's log-probability from that of the "
        "reference counts",
        gt=0,
    )
    target: str | None = key(
        None,
        "own: your class, such as mypackage.MyObjective (see data/objective.py)",
        name="_target_",
    )
    arguments: dict[str, Any] = key({}, "own: keyword arguments of your class")

    @property
    def are_preferences(self) -> bool:
        return self.kind == "preferences"

    @property
    def is_next_token(self) -> bool:
        return self.kind == "next_token"

    @property
    def spec(self) -> ObjectiveSpec:
        """What is known of the objective; of a class of the user's own, only its name."""
        return OBJECTIVES.get(self.kind) or ObjectiveSpec(self.target or "", targets="targets")

    @property
    def unit(self) -> str:
        """What train.sequence_length counts, in a word: the columns of a row of its own,
        of which padding may be some, are no tokens of the data."""
        return "columns" if self.spec.source or self.spec.whole else "tokens"

    @property
    def counted(self) -> str:
        """What rows of metrics count as `tokens`, in a word."""
        return "preferences" if self.are_preferences else "tokens"

    @property
    def made_with(self) -> TargetConfig:
        """The class of the objective and its keyword arguments from this section."""
        own = {argument: getattr(self, name) for name, argument in self.spec.settings}
        return TargetConfig(self.spec.name, own or self.arguments)

    def problems(self) -> Problems:
        if self.kind == "own":
            return TargetConfig(self.target or "").problems() + self._problems_of_settings()
        if self.kind not in OBJECTIVES:
            near = ", ".join(nearest_first(self.kind, [*OBJECTIVES, "own"]))
            return [("kind", f"{self.kind!r} is no objective", f"choose one of {near}")]
        found = self._problems_of_settings()
        if self.target:
            todo = "write objective.kind=own, or take it out"
            found.append(("_target_", f"{self.kind} has no such setting", todo))
        if self.kind == "pairs" and not self.pairs_separator:
            todo = (
                r"name the token between source and target, such as objective.pairs_separator='\t'"
            )
            found.append(("pairs_separator", "pairs need one", todo))
        if self.masked_hidden + self.masked_random > 1:
            both = f"{self.masked_hidden:g} and masked_random={self.masked_random:g}"
            todo = "give shares whose sum is at most 1"
            found.append(("masked_hidden", f"{both} are more than all targets", todo))
        return found

    def unread(self) -> Problems:
        """Return the keys that have no effect; a command must leave them out."""
        if self.kind == "own" or not self.arguments:
            return []
        todo = "leave it out, or write objective.kind=own"
        return [("arguments", f"has no effect on objective {self.kind}", todo)]

    def _problems_of_settings(self) -> Problems:
        """Settings of other objectives that differ from their defaults."""
        own = {name for name, _ in self.spec.settings}
        others = {name for spec in OBJECTIVES.values() for name, _ in spec.settings} - own
        return [
            (f.name, f"objective {self.kind} has no such setting", "take it out")
            for f in fields(self)
            if f.name in others and getattr(self, f.name) != f.default
        ]


def objective_problems(job: "TrainJob") -> Problems:
    """Return what is wrong between the objective, the model that it trains and the data that it
    reads, in words of the whole job."""
    kind, layers = job.objective.kind, getattr(job.model, "encoder_layers", 0)
    found: Problems = []
    if job.validation.abilities and not job.continues_text:
        problem = f"a model of objective.kind={kind} continues no text"
        if job.objective.spec.continues_text:
            problem = "are for a model that reads a text as one row and sees no later token"
        found.append(("validation.abilities", problem, "leave it out"))
    has_source = bool(job.objective.spec.source)
    has_one_row = job.objective.is_next_token or kind in ("responses", "preferences")
    writes = has_one_row or (has_source and not layers)
    if not getattr(job.model, "causal", True) and writes:
        problem = "a model that sees later tokens is shown the token that it must predict"
        todo = "leave it out, or give objective.kind=masked, which hides its targets"
        found.append(("model.causal", problem, todo))
    if getattr(job.model, "causal", False) and job.objective.spec.sees_both_sides:
        problem = f"objective {kind} is for a model that sees both sides"
        found.append(("model.causal", problem, "write model.causal=false"))
    if layers and has_one_row:
        problem = "an encoder-decoder needs rows of a source and a target"
        found.append(
            ("model.encoder_layers", problem, "write objective.kind=seq2seq, prefix or pairs")
        )
    if (columns := job.train.sequence_length) < (least := job.objective.spec.shortest):
        problem = f"{columns} columns are too few for a row of objective {kind}"
        found.append(("train.sequence_length", problem, f"give at least {least}"))
    source = job.objective.pairs_source
    if kind == "pairs" and source is not None and columns <= source:
        problem = f"{source} of {columns} columns leave none for the target"
        found.append(("objective.pairs_source", problem, f"give at most {columns - 1}"))
    if job.data.document_mask and (has_source or job.objective.spec.whole):
        problem = f"a row of {kind} has no documents of its own, as a window has"
        found.append(("data.document_mask", problem, "leave it out"))
    if job.data.packing == "best_fit" and not job.objective.is_next_token:
        problem = f"best_fit counts next tokens, not the targets of objective {kind}"
        found.append(("data.packing", problem, "write data.packing=windows"))
    return found + (_preference_problems(job) if job.objective.are_preferences else [])


def _preference_problems(job: "TrainJob") -> Problems:
    found: Problems = []
    if not job.run.origin.run:
        problem = "preferences are learned beside a reference, the weights that a run begins with"
        found.append(("run.from.run", problem, "name the run to go on from"))
    if getattr(job.model, "mtp_layers", 0):
        problem = "modules for later tokens would learn the rejected responses too"
        found.append(("model.mtp_layers", problem, "choose a model without them"))
    if job.engine.sequence_parallel > 1:
        problem = "the loss of a preference needs whole responses, not a rank's columns of them"
        found.append(("engine.sequence_parallel", problem, "leave it out"))
    return found
