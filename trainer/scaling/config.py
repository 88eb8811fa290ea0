"""The config keys of `forescale study`, and its actions with the keys that each reads.

Invariant: the defaults follow the literature that the laws come from: N counts the blocks and the
output head, C counts the FLOPs of a causal model, and the objective is Huber's with delta 1e-3 on
log loss.
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from forescale.config.job import Action, Job, Problems, RootConfig
from forescale.config.schema import key, section


@dataclass
class TargetPoint:
    """The run whose loss is predicted: by N and D, by C alone, or by device-hours."""

    parameters: float | None = key(None, "N, parameters of the target run", gt=0)
    tokens: float | None = key(None, "D, training tokens of the target run", gt=0)
    flops: float | None = key(
        None, "C, FLOPs of the target run; given alone, the law chooses the best N and D", gt=0
    )
    device_hours: float | None = key(
        None, "compute of the target run in device-hours, at plan.rate FLOP/s", gt=0
    )
    branches: list[float] = key(
        [], "D of shorter runs that branch off the target; each is predicted too"
    )
    run: str | None = key(None, "name that the target run will have; its loss scores the forecast")
    far: bool = key(False, "predict beyond 30 times the compute of the largest run too")

    @property
    def is_given(self) -> bool:
        """True if any of its size or compute is given."""
        return any(
            value is not None
            for value in (self.parameters, self.tokens, self.flops, self.device_hours)
        )


LawName = Literal[
    "chinchilla", "shared-exponent", "over-training", "kaplan", "frontier", "data-constrained",
    "auto",
]  # fmt: skip
_DEFAULT_ARGUMENTS = ["data=bytes", "optimizer=adamw", "validation.every=100 %"]


@dataclass
class PlanKeys:
    """Which runs a study trains, and what all of them share."""

    cap: float | None = key(
        None, "FLOPs that the whole study may spend, counted as `cost` says", gt=0
    )
    kind: Literal["isoflop", "ladder", "list"] = key(
        "isoflop",
        "isoflop: sizes within each compute budget; ladder: sizes times multiples of 20 N tokens; "
        "list: the runs in plan.runs",
    )
    arguments: list[str] = key(
        [],
        "arguments of `forescale train` that all runs share; better written after `--`, as in "
        "-- data.path=DIR; without any: the embedded corpus as bytes, AdamW, evaluation at the end",
    )
    budgets: int = key(5, "isoflop: number of compute budgets", ge=3)
    sizes: int = key(5, "isoflop: number of model sizes in each budget", ge=3)
    ladder: list[float] = key([1e5, 2e5, 4e5, 8e5], "ladder: the model sizes N")
    multiples: list[float] = key([1, 2, 4], "ladder: training tokens D in multiples of 20 N")
    model: str = key("tiny", "model=CHOICE whose kind of layers all sizes have")
    runs: list[list[float]] = key([], "list: the runs as [[N, D], ...]")
    vocab_size: int | None = key(
        None,
        "vocabulary size; null: the data's; a large vocabulary dominates N of small models",
        ge=2,
    )
    sequence_length: int = key(256, "sequence length of all runs", ge=1)
    micro_batch: int = key(
        8, "windows that all ranks feed at once; batch sizes are multiples of it", ge=1
    )
    rate: float | None = key(
        None, "FLOP/s that one device reaches; null: device-hours are not shown", gt=0
    )
    seeds: list[int] = key([5, 3], "number of seeds of the cheapest cell, and of an expensive one")
    joint_sweep: bool = key(
        False,
        "isoflop: at the lowest and the highest budget, try three batch sizes at three learning "
        "rates each, not at one",
    )
    unique: float | None = key(
        None, "unique training tokens; runs with more are flagged; null: the data's", gt=0
    )
    step: float = key(10**0.5, "isoflop: factor from one budget to the next", gt=1)
    ratio: float = key(20, "isoflop: D/N in the middle of the first budget", gt=0)
    spread: float = key(
        2.5, "isoflop: sizes of a budget reach from N*/spread to N* times spread", gt=1
    )

    @property
    def shared(self) -> list[str]:
        """The arguments of `forescale train` that all runs share."""
        return [f"model={self.model}", *(self.arguments or _DEFAULT_ARGUMENTS)]


@dataclass
class LaunchKeys:
    """How the runs of a study are launched."""

    at_once: int = key(1, "number of cells that run at the same time", ge=1)
    retry: bool = key(False, "start cells again that failed or diverged")
    target: bool = key(False, "after all other cells, predict the target and train it")
    slurm: str | None = key(
        None, "slurm=CHOICE of `forescale submit` to queue the cells with; null: run them here"
    )
    arguments: list[str] = key(
        [], "more arguments of `forescale submit`; better written after `--`"
    )
    trust: bool = key(
        False, "allow running the classes (_target_) that the study's stored arguments name"
    )
    follow: bool = key(True, "with launch.slurm: stay, and submit cells as they become ready")


# The keys that several actions read.
_STUDY = ("study", "studies")
_RUNS = ("input", "columns", "rows", "run.root")
_LAW = (
    "form", "method", "size", "cost", "delta", "weights", "drop_largest", "near", "bootstraps",
    "resample", "level", "seed",
)  # fmt: skip
_TARGET = ("target.parameters", "target.tokens", "target.flops", "target.far")

ACTIONS = {
    "plan": Action(
        "Choose and price the runs of a study, and simulate how precise its prediction will be.",
        (*_STUDY, "plan.*", *_LAW, "target.*"),
        (
            "study plan study=mine plan.cap=1e15 target.flops=4e15",
            "study plan study=mine plan.cap=1e18 -- data.path=DIR model.mlp=gelu   (of all runs)",
        ),
    ),
    "launch": Action(
        "Train the planned runs, here or in SLURM's queue; the same command again resumes them.",
        (*_STUDY, "launch.*"),
        (
            "study launch study=mine launch.at_once=2",
            "study launch study=mine launch.slurm=PROFILE -- slurm.time='2 h'   (as job arrays)",
        ),
    ),
    "status": Action(
        "Show the state, loss and cost of every run of a study.",
        (*_STUDY, "live"),
        ("study status study=mine --live",),
    ),
    "sync": Action(
        "Take all decisions that the results so far allow, and launch nothing.",
        (*_STUDY, "live"),
        ("study sync study=mine",),
    ),
    "exclude": Action(
        "Leave runs out of the fit, with a reason that is stored.",
        (*_STUDY, "cells", "why"),
        ("study exclude study=mine cells=[s2-n3] why='a faulty node'",),
    ),
    "next": Action(
        "Choose the additional runs that narrow the prediction most for their cost.",
        (
            *_STUDY, *_RUNS, *_LAW, *_TARGET, "target.device_hours", "cap", "add",
            "plan.arguments", "plan.model", "plan.vocab_size", "plan.sequence_length",
            "plan.micro_batch", "plan.rate", "plan.unique",
        ),
        ("study next study=mine cap=1e15 add=true",),
    ),
    "fit": Action(
        "Fit the scaling law to a study, to other runs or to a table, and predict the target.",
        (*_STUDY, *_RUNS, *_LAW, *_TARGET, "sensitivity", "json"),
        (
            "study fit study=mine",
            "study fit 'runs/*' target.flops=1e18",
            "study fit points.csv columns='{parameters: Model Size, flops: Training FLOP}'",
            "study fit points.csv form=over-training target.parameters=7e9 target.tokens=1e12",
        ),
    ),
    "report": Action(
        "Write the fit, its figures and its doubts as one HTML file.",
        (*_STUDY, *_RUNS, *_LAW, *_TARGET, "to"),
        ("study report study=mine", "study report 'runs/*' target.flops=1e18 to=report.html"),
    ),
    "predict": Action(
        "Store a forecast of a run before it is trained.",
        (*_STUDY, *_RUNS, *_LAW, *_TARGET, "target.branches", "target.run"),
        ("study predict 'runs/small-*' target.run=big target.parameters=1e8 target.tokens=2e9",),
    ),
    "compare": Action(
        "Compare two recipes or datasets: how many times less compute reaches the same loss.",
        (*_STUDY, *_RUNS, *_LAW, *_TARGET, "by", "groups", "to", "json"),
        (
            "study compare old.csv new.csv target.flops=1e21 to=compare.html",
            "study compare 'runs/adamw-*' 'runs/muon-*'   (or two studies by name)",
            "study compare points.csv by=dataset groups=[c4,web]",
        ),
    ),
    "backtest": Action(
        "Judge forecasts by finished studies: what each method would have said, and how far off.",
        (*_STUDY, *_RUNS, "form", "size", "cost", "delta", "near", "json"),
        (
            "study backtest study=mine",
            "study backtest points.csv columns='{parameters: Model Size, budget: C}'",
            "study backtest 'tables/*.csv' --json   (of every table, and of all together)",
        ),
    ),
    "score": Action(
        "Compare the stored forecasts with the losses observed since.",
        (*_STUDY, *_RUNS, "json"),
        ("study score 'runs/*'",),
    ),
    "records": Action(
        "Print the runs as CSV, one row each.",
        (*_STUDY, *_RUNS),
        ("study records 'runs/*' > records.csv",),
    ),
}  # fmt: skip


@dataclass
class StudyJob(Job):
    """All keys of `forescale study`; ACTIONS says which action reads which."""

    VERB: ClassVar[str] = "study"
    TARGET: ClassVar[str] = "input"
    FLAGS: ClassVar[Mapping[str, str]] = {
        "--json": "json", "--live": "live", "--sensitivity": "sensitivity",
    }  # fmt: skip
    ACTIONS: ClassVar[Mapping[str, Action]] = ACTIONS

    study: str = key("first", "name of the study; its directory is studies/NAME")
    studies: str = key("studies", "the directory that holds the studies")
    input: list[str] = key(
        [],
        "runs (names, directories, glob patterns), or one table (CSV, parquet, JSON; several for "
        "backtest; two inputs for compare, also studies); none: the cells of the study",
    )
    columns: dict[str, str] = key(
        {},
        "which columns of the table to read, as {OUR NAME: ITS NAME}, such as {parameters: Model "
        "Size, loss: final}",
    )
    rows: dict[str, str] = key(
        {}, "read only the table's rows with these values, such as {dataset: c4}, by its own names"
    )
    by: str | None = key(
        None, "the column whose values tell the two groups apart, of one table, of runs or of cells"
    )
    groups: list[str] = key(
        [], "the two values of `by` to compare; the first is the reference; []: the only two"
    )
    form: LawName = key(
        "chinchilla",
        "the law to fit; auto: the one with the lowest backtest error near the target's "
        "extrapolation factor",
    )
    method: Literal["auto", "level", "law"] = key(
        "auto",
        "what predicts losses beyond the largest budget; level: the levels of the budgets, "
        "continued, and the loss off the optimum; law: the fitted law; auto: level, if three "
        "budgets have three sizes or more",
    )
    size: Literal["blocks_and_head", "non_embedding", "total"] = key(
        "blocks_and_head", "which parameters N counts, for our own runs"
    )
    cost: Literal["causal", "full", "6nd"] = key(
        "causal", "how C is counted, for our own runs: causal or full attention, or 6 N D"
    )
    delta: float | None = key(
        1e-3,
        "delta of the Huber objective on log loss; 0: least absolute deviations; null: least "
        "squares",
        ge=0,
    )
    weights: Literal["none", "noise", "distance", "both"] = key(
        "none",
        "weigh runs by 1/variance; noise: the variance of repeated runs; distance: 2 % per decade "
        "of compute between a run and the target",
    )
    drop_largest: int = key(0, "leave out this number of runs, those with the largest losses", ge=0)
    near: float | None = key(
        0.04,
        "fit only runs whose loss is within this fraction of the lowest of their budget, and its "
        "best three; null: all runs",
        gt=0,
    )
    bootstraps: int = key(1000, "number of bootstrap refits", ge=100)
    resample: Literal["pairs", "clusters", "residuals"] = key(
        "clusters",
        "what the bootstrap resamples; clusters: a trunk with all its branches (pairs where no run "
        "has branches)",
    )
    level: float = key(0.9, "level of the confidence and prediction intervals", gt=0, lt=1)
    sensitivity: bool = key(
        False, "fit with each way to count N and C, and compare; --sensitivity does the same"
    )
    seed: int = key(
        0, "seed of the bootstrap, of simulated studies, and, unless 0, of planned runs", ge=0
    )
    to: str | None = key(
        None, "the HTML file to write; null: studies/STUDY/report.html (compare writes none)"
    )
    json: bool = key(False, "print the result as JSON; --json does the same")
    plan: PlanKeys = section(PlanKeys, "which runs a study trains")
    launch: LaunchKeys = section(LaunchKeys, "how the runs of a study are launched")
    cap: float | None = key(None, "FLOPs that the additional runs may spend together", gt=0)
    add: bool = key(False, "add the chosen runs to the plan, and their cost to its cap")
    cells: list[str] = key([], "names of the cells to exclude")
    why: str | None = key(None, "why the cells are excluded; the reason is stored with the study")
    live: bool = key(False, "redraw the table every two seconds; --live does the same")
    target: TargetPoint = section(TargetPoint, "the run whose loss is predicted")
    run: RootConfig = section(RootConfig, "where the runs are")

    @property
    def folder(self) -> Path:
        """The directory of the study."""
        return Path(self.studies).expanduser() / self.study

    @property
    def report(self) -> Path:
        """The HTML file that `study report` writes."""
        return Path(self.to).expanduser() if self.to else self.folder / "report.html"

    @property
    def forecasts(self) -> Path:
        """The directory of the study's forecast files."""
        return self.folder / "forecasts"

    def problems(self) -> Problems:
        """A problem if there is nothing to read: no input, and no planned study."""
        if self.input or self.plan.cap or (self.folder / "plan.json").is_file():
            return []
        todo = "name runs or a table (forescale study fit 'runs/*'), or plan a study first"
        return [("input", f"names no runs, and {self.folder} holds no plan", todo)]
