"""What `study` may be told: which runs, which law, how sure.

Invariant: defaults are the design's: N counts blocks and head, C what a causal model needs, Huber's
delta is 1e-3 on log loss.
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from trainer.config import Problems
from trainer.schema import key, section


@dataclass
class TargetPoint:
    parameters: float | None = key(None, "N of a run to come", gt=0)
    tokens: float | None = key(None, "D of it", gt=0)
    flops: float | None = key(None, "C of it; alone: the best N and D for so much", gt=0)
    run: str | None = key(None, "its name, for `predict`: the card is scored when it has a record")

    @property
    def is_given(self) -> bool:
        return any(value is not None for value in (self.parameters, self.tokens, self.flops))


@dataclass
class StudyPlan:
    cap: float | None = key(None, "FLOPs that the whole study may spend, by `cost`", gt=0)
    kind: Literal["isoflop", "ladder"] = key(
        "isoflop", "budgets x sizes, or sizes x multiples of D"
    )
    budgets: int = key(5, "of a grid, half a decade apart", ge=3)
    sizes: int = key(5, "of a grid, in each budget", ge=3)
    ladder: list[float] = key([1e5, 2e5, 4e5, 8e5], "of a ladder: each N")
    multiples: list[float] = key([1, 2, 4], "of a ladder: D in multiples of 20 N")
    model: str = key("tiny", "the choice of model= whose kind of layers all sizes have")
    vocab_size: int = key(256, "256: bytes; a large one dwarfs small models", ge=2)
    sequence_length: int = key(256, "of all runs", ge=1)
    micro_batch: int = key(8, "windows that all ranks feed at once: batches are multiples", ge=1)
    rate: float | None = key(None, "FLOP/s that a device reaches; null: hours aren't known", gt=0)
    unique: float | None = key(None, "tokens of the data, to flag what reads them twice", gt=0)


@dataclass
class StudyRoots:
    root: str = key("runs", "the directory that holds the runs")


@dataclass
class StudyJob:
    TARGET: ClassVar[str] = "input"

    study: str = key("first", "the study that forecasts belong to: studies/NAME")
    studies: str = key("studies", "the directory that holds the studies")
    input: list[str] = key([], "runs (names, directories, globs), or one table: CSV or parquet")
    columns: dict[str, str] = key(
        {}, "of a table, ours: theirs, such as {parameters: Model Size, loss: final}"
    )
    rows: dict[str, str] = key(
        {}, "of a table: only rows with these words, such as {dataset: c4}; by its own names"
    )
    form: Literal[
        "chinchilla", "shared-exponent", "over-training", "kaplan", "frontier", "data-constrained"
    ] = key("chinchilla", "the law")
    size: Literal["blocks_and_head", "non_embedding", "total"] = key(
        "blocks_and_head", "what N counts, of our own runs"
    )
    cost: Literal["causal", "full", "6nd"] = key("causal", "what C counts, of our own runs")
    delta: float = key(1e-3, "Huber's, on log loss; 0: least absolute deviations", ge=0)
    drop_largest: int = key(0, "leave out so many runs of the greatest losses", ge=0)
    near: float | None = key(
        0.04, "fit only runs within so much of the least loss of their budget; null: all", gt=0
    )
    bootstraps: int = key(1000, "fits of resampled runs", ge=100)
    resample: Literal["pairs", "clusters", "residuals"] = key(
        "clusters", "clusters: trunks with all their branches; pairs where there are none"
    )
    level: float = key(0.9, "of the intervals", gt=0, lt=1)
    seed: int = key(0, "of the resampling", ge=0)
    to: str | None = key(None, "of `report`: the HTML file; null: studies/STUDY/report.html")
    json: bool = key(False, "print all as JSON, for programs; --json does the same")
    plan: StudyPlan = section(StudyPlan, "of `plan`: what is to be run")
    target: TargetPoint = section(TargetPoint, "a run to come")
    run: StudyRoots = section(StudyRoots, "where the runs live")

    @property
    def folder(self) -> Path:
        return Path(self.studies).expanduser() / self.study

    @property
    def report(self) -> Path:
        return Path(self.to).expanduser() if self.to else self.folder / "report.html"

    @property
    def forecasts(self) -> Path:
        return self.folder / "forecasts"

    def problems(self) -> Problems:
        if self.input or self.plan.cap:
            return []
        todo = "name runs or a table: forescale study fit runs/* or study fit points.csv"
        return [("input", "names no runs", todo)]
