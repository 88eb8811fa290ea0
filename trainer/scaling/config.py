"""The config keys of `forescale study`. The file of each action says which of them it reads.

Invariant: the defaults follow the literature that the laws come from: N counts the blocks and the
output head, C counts the FLOPs of a causal model, and the objective is Huber's with delta 1e-3 on
log loss.
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from forescale.config.job import Job, RootConfig
from forescale.config.schema import key, section


@dataclass
class TargetPoint:
    """The run whose loss is predicted: by N and D, by C alone, or by device-hours."""

    parameters: float | None = key(None, "N, parameters of the target run", gt=0, common=True)
    tokens: float | None = key(None, "D, training tokens of the target run", gt=0, common=True)
    flops: float | None = key(
        None,
        "C, FLOPs of the target run; given alone, the law chooses the best N and D",
        gt=0,
        common=True,
    )
    expansion: float | None = key(
        None,
        "form=experts: experts of a layer over those that a token uses; 1: a dense model",
        ge=1,
    )
    device_hours: float | None = key(
        None, "compute of the target run in device-hours, at plan.rate FLOP/s", gt=0
    )
    branches: list[float] = key(
        [], "D of shorter runs that branch off the target; each is predicted too"
    )
    run: str | None = key(
        None, "name that the target run will have; its loss scores the forecast", common=True
    )
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
    "experts", "auto",
]  # fmt: skip
_DEFAULT_ARGUMENTS = ["data=bytes", "optimizer=adamw", "validation.every=100 %"]


@dataclass
class PlanKeys:
    """Which runs a study trains, and what all of them share."""

    cap: float | None = key(
        None,
        "FLOPs that the whole study may spend, counted as `cost` says",
        gt=0,
        common=True,
    )
    kind: Literal["isoflop", "ladder", "list", "recipes"] = key(
        "isoflop",
        "isoflop: sizes within each compute budget; ladder: sizes times multiples of 20 N tokens; "
        "list: the runs in plan.runs; recipes: a base and candidates at equal compute",
        common=True,
    )
    candidates: list[str] = key(
        [],
        "recipes: names of the file's recipes to compare with the base; A+B: both at once",
        common=True,
    )
    base: list[str] = key(
        [], "recipes: names of the file's recipes that make up the base", common=True
    )
    recipes: str | None = key(
        None,
        "recipes: YAML file with the arguments of each recipe, as NAME: [KEY=VALUE, ...]; null: "
        "those of forescale itself",
    )
    fresh: int = key(3, "recipes: fresh seeds that confirm a winner; 0: none", ge=0)
    beyond: int = key(
        1,
        "recipes: budgets of the base alone above the highest, each 2.5 times the one before: the "
        "largest multiplier that can be measured is 2.5, or 6.25 with 2 of them",
        ge=1,
    )
    arguments: list[str] = key(
        [],
        "arguments of `forescale train` that all runs share; better written after `--`, as in "
        "-- data.path=DIR; without any: the embedded corpus as bytes, AdamW, evaluation at the end",
    )
    budgets: int = key(5, "isoflop, recipes: number of compute budgets", ge=3, common=True)
    sizes: int = key(5, "isoflop: number of model sizes in each budget", ge=3, common=True)
    ladder: list[float] = key([1e5, 2e5, 4e5, 8e5], "ladder: the model sizes N")
    multiples: list[float] = key([1, 2, 4], "ladder: training tokens D in multiples of 20 N")
    model: str = key("tiny", "model=CHOICE that sets the kind of layers of all sizes")
    runs: list[list[float]] = key([], "list: the runs as [[N, D], ...]")
    vocab_size: int | None = key(
        None,
        "vocabulary size; null: the data's; a large vocabulary dominates N of small models",
        ge=2,
    )
    sequence_length: int = key(256, "sequence length of all runs", ge=1, common=True)
    micro_batch: int = key(
        8, "windows that all ranks feed at once; larger batches are multiples of it", ge=1
    )
    ranks: int = key(
        1,
        "ranks of each run, such as one a GPU: each feeds an equal part of plan.micro_batch",
        ge=1,
    )
    rate: float | None = key(
        None, "FLOP/s that one device reaches; null: device-hours are not shown", gt=0
    )
    seeds: list[int] = key(
        [5, 3],
        "number of seeds of the cheapest cell, and of an expensive one; recipes: of each recipe at "
        "its best rate, below the highest budget, and there",
    )
    joint_sweep: bool = key(
        False,
        "isoflop: at the lowest and the highest budget, try three batch sizes at three learning "
        "rates each, not at one",
    )
    unique: float | None = key(
        None, "unique training tokens; runs with more are flagged; null: the data's", gt=0
    )
    step: float = key(10**0.5, "isoflop, recipes: factor from one budget to the next", gt=1)
    ratio: float = key(
        20, "isoflop: D/N in the middle of the first budget; recipes: D/N of the base", gt=0
    )
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


@dataclass
class StudyJob(Job):
    """All keys of `forescale study`. Each action reads some of them."""

    VERB: ClassVar[str] = "study"
    TARGET: ClassVar[str] = "input"
    FLAGS: ClassVar[Mapping[str, str]] = {
        "--json": "json", "--live": "live", "--sensitivity": "sensitivity",
    }  # fmt: skip

    study: str = key("first", "name of the study; its directory is studies/NAME", common=True)
    studies: str = key("studies", "the directory that holds the studies")
    input: list[str] = key(
        [],
        "runs (names, directories, glob patterns), or one table (.csv, .tsv, .csv.gz, .tsv.gz, "
        ".parquet, .json, .jsonl; several for backtest; two inputs for compare, also studies); "
        "none: the cells of the study",
        common=True,
    )
    columns: dict[str, str] = key(
        {},
        "which columns of the table to read, as {OUR NAME: ITS NAME}, such as {parameters: Model "
        "Size, loss: final}",
        common=True,
    )
    rows: dict[str, str] = key(
        {}, "read only the table's rows with these values, such as {dataset: c4}, by its own names"
    )
    by: str | None = key(
        None, "column of the table, the runs or the cells whose values are the two groups"
    )
    groups: list[str] = key(
        [], "the two values of `by` to compare; the first is the reference; []: the only two"
    )
    reference: str = key("base", "of recipes: the one that the others are compared with")
    tasks: dict[str, str] = key(
        {},
        "the columns with the metric of each task, as {TASK: COLUMN}; shares from 0 to 1",
        common=True,
    )
    task_losses: dict[str, str] = key(
        {}, "the columns with each task's own loss, as {TASK: COLUMN}; without it, the loss"
    )
    task: str | None = key(
        None,
        "the column with the metric of a task, of the table or of the records; predicted too",
        common=True,
    )
    metric: Literal["accuracy", "error", "loss"] = key(
        "accuracy",
        "what the columns of `task` and `tasks` hold; accuracy, error: shares from 0 to 1; loss: "
        "positive numbers without an upper end",
    )
    link: Literal["auto", "sigmoid-to-1", "sigmoid", "exponential", "power"] = key(
        "auto",
        "the law from a loss to the metric; sigmoid-to-1: an accuracy from a floor to 1; sigmoid: "
        "OLMo's; exponential: Err = epsilon - k exp(-gamma L); power: M = E + K L^kappa, for "
        "metric=loss; auto: power for a loss, else sigmoid-to-1",
    )
    chance: float | None = key(
        None, "the accuracy of guessing, the floor of the link; null: it is fitted", ge=0, lt=1
    )
    against: list[Literal["parameters", "tokens", "flops"]] = key(
        [],
        "columns of the laws of `rates`; []: N and D, or N alone where sweeps can't separate them",
    )
    form: LawName = key(
        "chinchilla",
        "the law to fit; auto: the one with the lowest backtest error near the target's "
        "extrapolation factor",
        common=True,
    )
    method: Literal["auto", "level", "law"] = key(
        "auto",
        "what predicts losses beyond the largest budget; level: the levels of the budgets, "
        "continued, and the loss off the optimum; law: the fitted law; auto: level, if three "
        "budgets have three sizes or more",
    )
    size: Literal["blocks_and_head", "non_embedding", "total", "active"] = key(
        "blocks_and_head",
        "which parameters N counts, for our own runs; active: all but the experts that a token "
        "does not use",
    )
    cost: Literal["causal", "full", "6nd"] = key(
        "causal", "how C is counted, for our own runs: causal or full attention, or 6 N D"
    )
    delta: float | None = key(
        1e-3,
        "delta of the Huber objective, in units of the residual; 0: least absolute deviations; "
        "null: least squares",
        ge=0,
    )
    residual: Literal["log", "loss"] = key(
        "log", "what is minimised: residuals of log loss, or of the loss itself"
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
    level: float = key(
        0.9, "level of the confidence and prediction intervals", gt=0, lt=1, common=True
    )
    sensitivity: bool = key(
        False, "fit with each way to count N and C, and compare; --sensitivity does the same"
    )
    seed: int = key(
        0, "seed of the bootstrap, of simulated studies, and, unless 0, of planned runs", ge=0
    )
    to: str | None = key(
        None,
        "the HTML file to write; null: studies/STUDY/report.html (compare writes none)",
        common=True,
    )
    json: bool = key(False, "print the result as JSON; --json does the same", common=True)
    plan: PlanKeys = section(PlanKeys, "which runs a study trains")
    launch: LaunchKeys = section(LaunchKeys, "how the runs of a study are launched")
    cap: float | None = key(
        None, "FLOPs that the additional runs may spend together", gt=0, common=True
    )
    add: bool = key(
        False, "add the chosen runs to the plan, and their cost to its cap", common=True
    )
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
