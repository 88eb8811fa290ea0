"""What `study` may be told: which runs, which law, how sure.

Invariant: defaults are the design's: N counts blocks and head, C what a causal model needs, Huber's
delta is 1e-3 on log loss.
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from forescale.config.job import Job, Problems
from forescale.config.schema import key, section


@dataclass
class TargetPoint:
    parameters: float | None = key(None, "N of a run to come", gt=0)
    tokens: float | None = key(None, "D of it", gt=0)
    flops: float | None = key(None, "C of it; alone: the best N and D for so much", gt=0)
    device_hours: float | None = key(None, "of it, at plan.rate", gt=0)
    branches: list[float] = key([], "D of shorter decays off it: `predict` gives each a band")
    run: str | None = key(None, "its name, for `predict`: the card is scored when it has a record")

    @property
    def is_given(self) -> bool:
        return any(
            value is not None
            for value in (self.parameters, self.tokens, self.flops, self.device_hours)
        )


LawName = Literal[
    "chinchilla", "shared-exponent", "over-training", "kaplan", "frontier", "data-constrained",
    "auto",
]  # fmt: skip
_SHARED = ["data=bytes", "optimizer=adamw", "validation.every=100 %"]


@dataclass
class StudyPlan:
    cap: float | None = key(None, "FLOPs that the whole study may spend, by `cost`", gt=0)
    kind: Literal["isoflop", "ladder", "list"] = key(
        "isoflop", "budgets x sizes, or sizes x multiples of D, or the runs that are given"
    )
    words: list[str] = key(
        [],
        "what all runs share, written after `--`: words of `train`, such as -- data.path=DIR; "
        "none: the embedded corpus as bytes, AdamW, evaluated at the end",
    )
    budgets: int = key(5, "of a grid, half a decade apart", ge=3)
    sizes: int = key(5, "of a grid, in each budget", ge=3)
    ladder: list[float] = key([1e5, 2e5, 4e5, 8e5], "of a ladder: each N")
    multiples: list[float] = key([1, 2, 4], "of a ladder: D in multiples of 20 N")
    model: str = key("tiny", "the choice of model= whose kind of layers all sizes have")
    runs: list[list[float]] = key([], "of a list: [[N, D], ...]")
    vocab_size: int | None = key(
        None, "null: that of the data; a large one dwarfs small models", ge=2
    )
    sequence_length: int = key(256, "of all runs", ge=1)
    micro_batch: int = key(8, "windows that all ranks feed at once: batches are multiples", ge=1)
    rate: float | None = key(None, "FLOP/s that a device reaches; null: hours aren't known", gt=0)
    seeds: list[int] = key([5, 3], "of the cheapest cell, and of one near the top")
    cross: bool = key(
        False, "of a grid, at its lowest and highest budget: batches at three learning rates each"
    )
    unique: float | None = key(
        None, "tokens of the data, to flag what reads them twice; null: those of the data", gt=0
    )
    step: float = key(10**0.5, "of a grid: from one budget to the next", gt=1)
    ratio: float = key(20, "of a grid: D/N at the middle of the first budget", gt=0)
    spread: float = key(2.5, "of a grid: sizes from N*/spread to N* x spread", gt=1)

    @property
    def shared(self) -> list[str]:
        return [f"model={self.model}", *(self.words or _SHARED)]


@dataclass
class StudyLaunch:
    at_once: int = key(1, "cells at a time, here or in the queue", ge=1)
    retry: bool = key(False, "begin again what failed or was halted")
    target: bool = key(False, "at the end, foretell and train the target")
    slurm: str | None = key(None, "a profile of `submit`: cells go into SLURM's queue; null: here")
    words: list[str] = key([], "more words of `submit`: what is written after `--`")
    follow: bool = key(True, "in the queue: stay, and submit what becomes ready")


@dataclass
class StudyRoots:
    root: str = key("runs", "the directory that holds the runs")


@dataclass
class StudyJob(Job):
    VERB: ClassVar[str] = "study"
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
    form: LawName = key("chinchilla", "the law; auto: by roll-outs as far beyond as the target is")
    size: Literal["blocks_and_head", "non_embedding", "total"] = key(
        "blocks_and_head", "what N counts, of our own runs"
    )
    cost: Literal["causal", "full", "6nd"] = key("causal", "what C counts, of our own runs")
    delta: float | None = key(
        1e-3, "Huber's, on log loss; 0: least absolute deviations; null: least squares", ge=0
    )
    weights: Literal["none", "noise", "distance", "both"] = key(
        "none", "noise: that of repeats; distance: to the target, 2 % a decade; each as 1/variance"
    )
    drop_largest: int = key(0, "leave out so many runs of the greatest losses", ge=0)
    near: float | None = key(
        0.04,
        "fit only runs within so much of the least loss of their budget, and its best three",
        gt=0,
    )
    bootstraps: int = key(1000, "fits of resampled runs", ge=100)
    resample: Literal["pairs", "clusters", "residuals"] = key(
        "clusters", "clusters: trunks with all their branches; pairs where there are none"
    )
    level: float = key(0.9, "of the intervals", gt=0, lt=1)
    sensitivity: bool = key(
        False, "fit by every way to count N and C, in a table; --sensitivity does the same"
    )
    seed: int = key(0, "of the resampling", ge=0)
    to: str | None = key(None, "of `report`: the HTML file; null: studies/STUDY/report.html")
    json: bool = key(False, "print all as JSON, for programs; --json does the same")
    plan: StudyPlan = section(StudyPlan, "of `plan`: what is to be run")
    launch: StudyLaunch = section(StudyLaunch, "of `launch`: where, and how many at once")
    cap: float | None = key(None, "of `next`: FLOPs that more runs may spend", gt=0)
    add: bool = key(False, "of `next`: put them into the plan, and their cost on its cap")
    cells: list[str] = key([], "of `exclude`: which")
    why: str | None = key(None, "of `exclude`: the reason, kept with the study")
    live: bool = key(False, "of `status`: draw it anew every two seconds; --live does the same")
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
        if self.input or self.plan.cap or (self.folder / "plan.json").is_file():
            return []
        todo = "name runs or a table (forescale study fit runs/*), or plan a study"
        return [("input", f"names no runs, and {self.folder} holds no plan", todo)]
