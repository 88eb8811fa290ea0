"""The objectives: the keys of each, and what the rest of the project must know of it.

To add an objective, write its class in data/objectives/ (data/objective.py has the protocol), and
the class of its keys here with a line in OBJECTIVES. Invariant: imports no torch.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from forescale.config.job import ProblemIterator
from forescale.config.schema import TargetConfig, key

if TYPE_CHECKING:
    from forescale.config.train import TrainJob


@dataclass
class ObjectiveConfig:
    """An objective, whose keys are the keyword arguments of its class.

    kind: its word. builder: the dotted name of its class.
    sees_both_sides: whether its model is an encoder, with model.causal=false.
    continues_text: whether its model can continue a text, and its losses are those of a text.
    source_kind: what the source is, where a row is a source and a target, and the class has
        `split`, the number of its columns: gaps, a text that lacks spans; start, that of a text;
        prompt, a text of its own, with an answer.
    targets: what a target is, in words for people.
    shortest: the fewest columns of a row with a target.
    whole: whether rows are whole documents, which a table finds, and no windows.
    rows: how many rows a window becomes.
    pads: whether rows may have padding, which the model must know of.
    """

    kind: ClassVar[str]
    builder: ClassVar[str] = ""
    sees_both_sides: ClassVar[bool] = False
    continues_text: ClassVar[bool] = True
    source_kind: ClassVar[str] = ""
    targets: ClassVar[str] = "tokens"
    shortest: ClassVar[int] = 1
    whole: ClassVar[bool] = False
    rows: ClassVar[int] = 1
    pads: ClassVar[bool] = False

    @property
    def are_preferences(self) -> bool:
        return self.kind == "preferences"

    @property
    def is_next_token(self) -> bool:
        return self.kind == "next_token"

    @property
    def unit(self) -> str:
        """What train.sequence_length counts, in a word: the columns of a row of its own,
        of which padding may be some, are no tokens of the data."""
        return "columns" if self.source_kind or self.whole else "tokens"

    @property
    def counted(self) -> str:
        """What rows of metrics count as `tokens`, in a word."""
        return "preferences" if self.are_preferences else "tokens"

    @property
    def made_with(self) -> TargetConfig:
        """The class of the objective and its keyword arguments."""
        return TargetConfig(self.builder, {f.name: getattr(self, f.name) for f in fields(self)})

    def conflicts(self, job: "TrainJob") -> ProblemIterator:
        """Yield what is wrong between this objective alone and its job, in keys of the job."""
        yield from ()


@dataclass
class NextTokenConfig(ObjectiveConfig):
    kind = "next_token"
    builder = "forescale.data.objective.NextToken"


@dataclass
class MaskedConfig(ObjectiveConfig):
    kind = "masked"
    pads = True
    builder = "forescale.data.objectives.masked.MaskedTokens"
    sees_both_sides = True
    continues_text = False
    targets = "masked tokens"

    rate: float = key(0.15, gt=0, lt=1)  # share of the tokens that are targets
    # share of the targets that the mask token replaces in the inputs
    hidden: float = key(0.8, ge=0, le=1)
    # share of the targets that a random token replaces; all others stay
    random: float = key(0.1, ge=0, le=1)
    # id of the mask token; null: that of the tokenizer ([MASK] or <mask>), if it has one, else a
    # new one, the first beyond its ids
    mask_token: int | None = key(None, ge=0)

    def problems(self) -> ProblemIterator:
        if self.hidden + self.random > 1:
            problem = f"{self.hidden:g} and random={self.random:g} are more than all targets"
            yield "hidden", problem, "give shares whose sum is at most 1"


@dataclass
class SpansConfig(ObjectiveConfig):
    kind = "seq2seq"
    builder = "forescale.data.objectives.spans.Spans"
    continues_text = False
    source_kind = "gaps"
    targets = "tokens of spans"
    shortest = 4  # a token, a span of one, and two sentinels

    rate: float = key(0.15, gt=0, lt=1)  # share of the tokens that spans take out
    mean: float = key(3.0, ge=1)  # mean length of a span, in tokens
    # ids that stand for spans, in order; null: those of the tokenizer (<extra_id_0>, <extra_id_1>,
    # ...), if it has them; []: new ones, beyond its ids
    sentinels: list[int] | None = None
    # two ids: that with which the decoder begins, and that which ends source and target; null:
    # T5's, if the tokenizer has its sentinels and <pad>; []: the first sentinel, and the next one
    around: list[int] | None = None

    def problems(self) -> ProblemIterator:
        if len(self.around or [0, 0]) != 2:
            yield "around", f"{self.around} are not two ids", "give two, such as T5's [0,1]"


@dataclass
class PrefixConfig(ObjectiveConfig):
    kind = "prefix"
    builder = "forescale.data.objectives.prefix.Prefix"
    continues_text = False
    source_kind = "start"
    targets = "tokens after the source"
    shortest = 2

    share: float = key(0.5, gt=0, lt=1)  # share of the tokens that are the source


@dataclass
class PairsConfig(ObjectiveConfig):
    kind = "pairs"
    pads = True
    builder = "forescale.data.objectives.pairs.Pairs"
    continues_text = False
    source_kind = "prompt"
    targets = "tokens of answers"
    shortest = 2
    whole = True

    # token between source and target of a document: its text, such as \t, or its id
    separator: str | None = None
    # columns of the source; null: half of train.sequence_length
    source: int | None = key(None, ge=1)
    # whether the sources of the data have the tokens that the tokenizer puts around a text, so that
    # a prompt gets them too; set by import and finetune
    framed: bool = False

    def problems(self) -> ProblemIterator:
        if not self.separator:
            todo = r"name the token between source and target, such as objective.separator='\t'"
            yield "separator", "pairs need one", todo

    def conflicts(self, job: "TrainJob") -> ProblemIterator:
        columns = job.train.sequence_length
        if self.source is not None and columns <= self.source:
            problem = f"{self.source} of {columns} columns leave none for the target"
            yield "objective.source", problem, f"give at most {columns - 1}"


@dataclass
class ResponsesConfig(ObjectiveConfig):
    kind = "responses"
    builder = "forescale.data.objectives.responses.Responses"
    targets = "tokens of responses"
    whole = True


@dataclass
class PreferencesConfig(ObjectiveConfig):
    kind = "preferences"
    builder = "forescale.data.objectives.responses.Preferences"
    targets = "preferences"
    whole = True
    rows = 2

    # weight of the change of a response's log-probability from that of the reference
    beta: float = key(0.1, gt=0)

    def conflicts(self, job: "TrainJob") -> ProblemIterator:
        if not job.run.origin.run:
            problem = (
                "preferences are learned beside a reference, the weights that a run begins with"
            )
            yield "run.from.run", problem, "name the run to go on from"
        if getattr(job.model, "mtp_layers", 0):
            problem = "modules for later tokens would learn the rejected responses too"
            yield "model.mtp_layers", problem, "choose a model without them"
        for axis, size in vars(job.mesh(1)).items():
            if size > 1 and axis in ("sequence", "context"):
                problem = "the loss of a preference needs whole responses, not a rank's columns"
                yield f"engine.{axis}_parallel", problem, "leave it out"


@dataclass
class OwnObjectiveConfig(TargetConfig, ObjectiveConfig):
    """A class of the user's own, with the protocol of data/objective.py."""

    kind = "own"
    targets = "targets"

    @property
    def made_with(self) -> TargetConfig:
        return TargetConfig(self.target, self.arguments)


OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    cls.kind: cls
    for cls in (
        *(NextTokenConfig, MaskedConfig, SpansConfig, PrefixConfig),
        *(PairsConfig, ResponsesConfig, PreferencesConfig, OwnObjectiveConfig),
    )
}


def objective_problems(job: "TrainJob") -> ProblemIterator:
    """Yield what is wrong between the objective, the model that it trains and the data that it
    reads, in keys of the job."""
    objective, layers = job.objective, getattr(job.model, "encoder_layers", 0)
    kind = objective.kind
    for name in ("abilities", "prompts") if not job.continues_text else ():
        problem = f"a model of objective={kind} continues no text"
        if objective.continues_text:
            problem = "are for a model that reads a text as one row and sees no later token"
        if getattr(job.validation, name):
            yield f"validation.{name}", problem, "leave it out"
    has_source = bool(objective.source_kind)
    has_one_row = objective.is_next_token or kind in ("responses", "preferences")
    writes = has_one_row or (has_source and not layers)
    if not getattr(job.model, "causal", True) and writes:
        problem = "a model that sees later tokens is shown the token that it must predict"
        todo = "leave it out, or give objective=masked, which hides its targets"
        yield "model.causal", problem, todo
    if getattr(job.model, "causal", False) and objective.sees_both_sides:
        problem = f"objective {kind} is for a model that sees both sides"
        yield "model.causal", problem, "write model.causal=false"
    if layers and has_one_row:
        problem = "an encoder-decoder needs rows of a source and a target"
        yield "model.encoder_layers", problem, "write objective=seq2seq, prefix or pairs"
    if (columns := job.train.sequence_length) < objective.shortest:
        problem = f"{columns} columns are too few for a row of objective {kind}"
        yield "train.sequence_length", problem, f"give at least {objective.shortest}"
    packs = job.data.packing == "best_fit"
    packs_examples = packs and kind == "responses"
    if job.data.document_mask and (has_source or objective.whole) and not packs_examples:
        problem = f"a row of {kind} has no documents of its own, as a window has"
        todo = "leave it out" + ", or add data.packing=best_fit" * (kind == "responses")
        yield "data.document_mask", problem, todo
    if packs_examples and not job.data.document_mask:
        problem = "examples side by side in a row would see each other"
        yield "data.packing", problem, "add data.document_mask=true"
    if packs_examples and job.data.damaged == "substitute":
        problem = "of packed examples hardly two rows have as many targets, so none can be replaced"
        yield "data.damaged", problem, "write data.damaged=fail"
    if packs and not (objective.is_next_token or packs_examples):
        problem = f"best_fit packs documents and examples of responses, not rows of {kind}"
        yield "data.packing", problem, "write data.packing=windows"
    yield from objective.conflicts(job)
