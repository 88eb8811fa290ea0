"""The config keys of `forescale study`. The file of each action says which of them it reads.

Invariant: the defaults follow the literature that the laws come from: N counts the blocks and the
output head, C counts the FLOPs of a causal model, and the objective is Huber's with delta 1e-3 on
log loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from forescale.config.job import Job, RootConfig
from forescale.config.schema import key, section


@dataclass
class TargetPoint:
    """The run whose loss is predicted: by N and D, by C alone, or by device-hours."""

    parameters: float | None = key(None, gt=0, common=True)  # N, parameters of the target run
    tokens: float | None = key(None, gt=0, common=True)  # D, training tokens of the target run
    # C, FLOPs of the target run; given alone, the best N and D are chosen
    flops: float | None = key(None, gt=0, common=True)
    # form=experts: experts of a layer over those that a token uses; 1: a dense model; with
    # target.flops, null is the best one
    expansion: float | None = key(None, ge=1)
    # form=precision: bits of all parts alike; null: the best, with target.flops
    bits: float | None = key(None, gt=0)
    # bits of the weights, of runs in which they differ
    weight_bits: float | None = key(None, gt=0)
    # bits of the activations, of runs in which they differ
    activation_bits: float | None = key(None, gt=0)
    # bits of the cache of keys and values, of runs in which they differ
    cache_bits: float | None = key(None, gt=0)
    # form=quantised: bits of the weights after training
    post_bits: float | None = key(None, gt=0)
    # form=vocabulary: N_v, its size times the model's width; null: the best, with target.flops
    vocabulary: float | None = key(None, gt=0)
    # compute of the target run in device-hours, at plan.rate FLOP/s
    device_hours: float | None = key(None, gt=0)
    # D of shorter runs that branch off the target; each is predicted too
    branches: list[float] = key([])
    # name that the target run will have; its loss scores the forecast
    run: str | None = key(None, common=True)
    # with target.flops: tokens that the model will serve; target.flops pays for them too
    served: float = key(0.0, ge=0)
    # with target.flops: the largest N that fits; form=experts: all experts of a layer counted
    most_parameters: float | None = key(None, gt=0)
    # tokens that exist: D beyond them is repeated, and worth less
    unique: float | None = key(None, gt=0)
    far: bool = False  # predict beyond 40 times the compute of the largest run too

    @property
    def is_given(self) -> bool:
        """True if any of its size or compute is given."""
        return any(
            value is not None
            for value in (self.parameters, self.tokens, self.flops, self.device_hours)
        )


LawName = Literal[
    "chinchilla", "shared-exponent", "over-training", "kaplan", "frontier", "data-constrained",
    "experts", "precision", "quantised", "vocabulary", "auto",
]  # fmt: skip
_DEFAULT_ARGUMENTS = ["data=bytes", "optimizer=adamw", "validation.every=100 %"]


@dataclass
class PlanKeys:
    """Which runs a study trains, and what all of them share."""

    # FLOPs that the whole study may spend, counted as `cost` says
    cap: float | None = key(None, gt=0, common=True)
    # isoflop: sizes within each compute budget; ladder: sizes times multiples of 20 N tokens; list:
    # the runs in plan.runs; recipes: a base and candidates at equal compute; mixtures: small runs
    # with different shares of the data's sources, and larger ones that check the best shares
    kind: Literal["isoflop", "ladder", "list", "recipes", "mixtures"] = key("isoflop", common=True)
    # recipes: names of the file's recipes to compare with the base; A+B: both at once
    candidates: list[str] = key([], common=True)
    # recipes: names of the file's recipes that make up the base
    base: list[str] = key([], common=True)
    # recipes: YAML file with the arguments of each recipe, as NAME: [KEY=VALUE, ...]; null: those
    # of forescale itself
    recipes: str | None = None
    fresh: int = key(3, ge=0)  # recipes: fresh seeds of a recipe at each setting; 0: none
    # recipes: budgets of the base alone above the highest, each 2.5 times the one before: the
    # largest multiplier that can be measured is 2.5, or 6.25 with 2 of them
    beyond: int = key(1, ge=1)
    points: int = key(20, ge=4)  # mixtures: number of different mixtures
    # mixtures: smallest share of a source in them; 0: each corner is one source alone
    least: float = key(0.05, ge=0, lt=0.5)
    # arguments of `forescale train` that all runs share; better written after `--`, as in --
    # data.path=DIR; without any: the embedded corpus as bytes, AdamW, evaluation at the end
    arguments: list[str] = key([])
    budgets: int = key(5, ge=3, common=True)  # isoflop, recipes: number of compute budgets
    # isoflop, recipes: number of model sizes in each budget; recipes: 1 keeps plan.ratio
    sizes: int = key(5, ge=1, common=True)
    # recipes: what each tunes at its first budgets beside size and learning rate: the rates of
    # tables and of scalars (norms, biases) over that of matrices, batch, warm-up, decay; null: all
    dials: list[Literal["tables", "scalars", "batch", "warmup", "decay"]] | None = None
    ladder: list[float] = key([1e5, 2e5, 4e5, 8e5])  # ladder: the model sizes N
    multiples: list[float] = key([1, 2, 4])  # ladder: training tokens D in multiples of 20 N
    model: str = "tiny"  # model=CHOICE that sets the kind of layers of all sizes
    runs: list[list[float]] = key([])  # list: the runs as [[N, D], ...]
    # vocabulary size; null: the data's; a large vocabulary dominates N of small models
    vocab_size: int | None = key(None, ge=2)
    sequence_length: int = key(256, ge=1, common=True)  # sequence length of all runs
    # windows that all ranks feed at once; larger batches are multiples of it
    micro_batch: int = key(8, ge=1)
    # ranks of each run, such as one a GPU: each feeds an equal part of plan.micro_batch
    ranks: int = key(1, ge=1)
    # isoflop: first find sizes, batch and learning rate by cheap runs at the lowest budget
    pilot: bool = False
    # FLOP/s that one device reaches; null: device-hours are not shown
    rate: float | None = key(None, gt=0)
    # number of seeds of the cheapest cell, and of an expensive one; recipes: of each recipe at its
    # best rate, below the highest budget, and there; mixtures: of the current mixture, and of each
    # of the two that are compared last
    seeds: list[int] = key([5, 3])
    # isoflop: at the lowest and the highest budget, try three batch sizes at three learning rates
    # each, not at one
    joint_sweep: bool = False
    # unique training tokens; runs with more are flagged; null: the data's
    unique: float | None = key(None, gt=0)
    # isoflop, recipes: factor from one budget to the next; mixtures: from the runs to their check
    step: float = key(10**0.5, gt=1)
    # isoflop: D/N in the middle of the first budget; recipes: D/N of the base where
    # each recipe begins its first budget; mixtures: of all
    ratio: float = key(20, gt=0)
    # isoflop, recipes: sizes of a budget reach from N*/spread to N* times spread
    spread: float = key(2.5, gt=1)

    @property
    def shared(self) -> list[str]:
        """The arguments of `forescale train` that all runs share."""
        return [f"model={self.model}", *(self.arguments or _DEFAULT_ARGUMENTS)]


@dataclass
class LaunchKeys:
    """How the runs of a study are launched."""

    at_once: int = key(1, ge=1)  # number of cells that run at the same time
    retry: bool = False  # start cells again that failed or diverged
    target: bool = False  # after all other cells, predict the target and train it
    # after a stage whose runs contradict their forecasts; ask: at a terminal, else continue
    contradiction: Literal["ask", "continue", "stop"] = "ask"
    # slurm=CHOICE of `forescale submit` to queue the cells with; null: run them here
    slurm: str | None = None
    # more arguments of `forescale submit`; better written after `--`
    arguments: list[str] = key([])
    # allow running the classes (_target_) that the study's stored arguments name
    trust: bool = False
    follow: bool = True  # with launch.slurm: stay, and submit cells as they become ready


@dataclass
class StudyJob(Job):
    """All keys of `forescale study`. Each action reads some of them."""

    VERB: ClassVar[str] = "study"
    TARGET: ClassVar[str] = "input"
    FLAGS: ClassVar[Mapping[str, str]] = {
        "--live": "live", "--sensitivity": "sensitivity",
    }  # fmt: skip

    study: str = key("first", common=True)  # name of the study; its directory is studies/NAME
    studies: str = "studies"  # the directory that holds the studies
    # runs (names, directories, glob patterns), or one table (.csv, .tsv, .csv.gz, .tsv.gz,
    # .parquet, .json, .jsonl; several for backtest; two inputs for compare, also studies); none:
    # the cells of the study
    input: list[str] = key([], common=True)
    # which columns of the table to read, as {OUR NAME: ITS NAME}, such as {parameters: Model Size,
    # loss: final}
    columns: dict[str, str] = key({}, common=True)
    # read only the table's rows with these values, such as {dataset: c4}, by its own names
    rows: dict[str, str] = key({})
    # column of the table, the runs or the cells whose values are the two groups
    by: str | None = None
    # the two values of `by` to compare; the first is the reference; []: the only two
    groups: list[str] = key([])
    reference: str = "base"  # of recipes: the one that the others are compared with
    # mixtures: the sources whose held-out losses the best shares minimise, with weights of their
    # mean, such as {code: 2, web: 1}; {}: all sources alike
    goal: dict[str, float] = key({}, common=True)
    # the column with the metric of a task, of the table or of the records; predicted too
    task: str | None = key(None, common=True)
    # what the column of `task` holds; accuracy, error: shares from 0 to 1; loss:
    # positive numbers without an upper end
    metric: Literal["accuracy", "error", "loss"] = "accuracy"
    # the law from a loss to the metric; sigmoid-to-1: an accuracy from a floor to 1; sigmoid:
    # OLMo's; exponential: Err = epsilon - k exp(-gamma L); power: M = E + K L^kappa, for
    # metric=loss; auto: power for a loss, else sigmoid-to-1
    link: Literal["auto", "sigmoid-to-1", "sigmoid", "exponential", "power"] = "auto"
    # the accuracy of guessing, the floor of the link; null: it is fitted
    chance: float | None = key(None, ge=0, lt=1)
    # columns of the laws of `rates`; []: N and D, or N alone where sweeps can't separate them
    against: list[Literal["parameters", "tokens", "flops"]] = key([])
    # the law to fit; auto: the one with the lowest backtest error near the target's extrapolation
    # factor
    form: LawName = key("chinchilla", common=True)
    # what predicts losses beyond the largest budget; combined: three continuations of the lowest
    # losses, and the loss off the optimum; law: the fitted law; auto: combined, if three budgets
    # have three sizes or more
    method: Literal["auto", "combined", "law"] = "auto"
    # which parameters N counts, for our own runs; active: all but the experts that a token does not
    # use
    size: Literal["blocks_and_head", "non_embedding", "total", "active"] = "blocks_and_head"
    # how C is counted, for our own runs: causal or full attention, or 6 N D
    cost: Literal["causal", "full", "6nd"] = "causal"
    # delta of the Huber objective, in units of the residual; 0: least absolute deviations; null:
    # least squares
    delta: float | None = key(1e-3, ge=0)
    # what is minimised: residuals of log loss, or of the loss itself
    residual: Literal["log", "loss"] = "log"
    drop_largest: int = key(0, ge=0)  # leave out this number of runs, those with the largest losses
    # fit only runs whose loss is within this fraction of the lowest of their budget, and its best
    # three; null: all runs
    near: float | None = key(0.04, gt=0)
    bootstraps: int = key(1000, ge=100)  # number of bootstrap refits
    # what the bootstrap resamples; clusters: a trunk with all its branches (pairs where no run has
    # branches)
    resample: Literal["pairs", "clusters"] = "clusters"
    # level of the confidence and prediction intervals
    level: float = key(0.9, gt=0, lt=1, common=True)
    # fit with each way to count N and C, and compare; --sensitivity does the same
    sensitivity: bool = False
    # seed of the bootstrap, of simulated studies, and, unless 0, of planned runs
    seed: int = key(0, ge=0)
    # the HTML file to write; null: studies/STUDY/report.html (compare writes none)
    to: str | None = key(None, common=True)
    plan: PlanKeys = section(PlanKeys)  # which runs a study trains
    launch: LaunchKeys = section(LaunchKeys)  # how the runs of a study are launched
    # FLOPs that the additional runs may spend together
    cap: float | None = key(None, gt=0, common=True)
    # add the chosen runs to the plan, and their cost to its cap
    add: bool = key(False, common=True)
    cells: list[str] = key([])  # names of the cells to exclude
    why: str | None = None  # why the cells are excluded; the reason is stored with the study
    live: bool = False  # redraw the table every two seconds; --live does the same
    target: TargetPoint = section(TargetPoint)  # the run whose loss is predicted
    run: RootConfig = section(RootConfig)  # where the runs are

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
