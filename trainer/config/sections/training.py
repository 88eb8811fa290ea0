"""Config sections `run` and `train`: what a run is called, its length and its batch.

Invariant: a rule about one section is in its class.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from forescale.config.duration import Duration
from forescale.config.job import ProblemIterator, Problems
from forescale.config.schema import key, section
from forescale.config.sections.batch import batch_ramp_problems
from forescale.config.sections.ramp import length_ramp_problems

# The best batch for D tokens, in tokens: 0.58 D^0.571 (Li et al. 2025, "Step Law", arXiv
# 2503.04715, from runs of 60M to 1B parameters and 2B to 100B tokens).
STEP_LAW_BATCH = (0.58, 0.571)


@dataclass
class OriginConfig:
    run: str | None = None  # run to branch from: its name or its directory
    step: int | None = key(None, ge=0)  # the checkpoint of this step; null: the newest
    # everything: continue at its step; weights: begin at step 0 with its weights
    load: Literal["everything", "weights"] = "everything"

    def problems(self) -> ProblemIterator:
        if self.run is None and self.step is not None:
            yield "step", "needs run.from.run", "set run.from.run=NAME"


@dataclass
class RunConfig:
    name: str = key("first", common=True)  # the run's name; its directory is run.root/run.name
    root: str = "runs"  # the directory that holds the runs
    # auto: resume the run if it exists; must: refuse a new run; never: refuse to resume
    resume: Literal["auto", "must", "never"] = "auto"
    # who may read the run's directory: mode 0700, 0750 or 0755
    access: Literal["owner", "group", "all"] = "owner"
    # branch off another run
    origin: OriginConfig = section(OriginConfig, name="from", kind="identity")

    @property
    def directory(self) -> Path:
        return Path(self.root).expanduser() / self.name

    @property
    def mode(self) -> int:
        """The mode of the run's directory."""
        return {"owner": 0o700, "group": 0o750, "all": 0o755}[self.access]

    def problems(self) -> Problems:
        if re.fullmatch(r"\w[\w.+-]*", self.name):
            return []
        problem = f"{self.name!r} can't be the name of a directory in run.root"
        return [("name", problem, "use letters, digits and . _ - +")]


@dataclass
class TrainConfig:
    steps: int | None = key(None, ge=1)  # length in optimizer steps, instead of train.tokens
    # length in tokens, rounded up to whole steps, instead of train.steps
    tokens: int | None = key(None, ge=1, common=True)
    # length in tokens for each parameter of the layers, instead of train.tokens
    tokens_per_parameter: float | None = key(None, gt=0)
    # targets per window; a window has one token more
    sequence_length: int = key(256, ge=1, common=True)
    # targets per row at first: windows are cut into rows of so many, which double up to
    # sequence_length over length_ramp; null: windows are never cut
    first_length: int | None = key(None, ge=1)
    # length of the run over which rows grow from first_length; each length as long
    length_ramp: Duration | None = key(None, gt=0, wall_time=False)
    # windows per optimizer step, over all ranks; 0: by the length in tokens
    global_batch: int = key(8, ge=0, common=True)
    # windows of the first steps, which double to global_batch; null: global_batch
    first_batch: int | None = key(None, ge=1)
    # with first_batch: length until the batch is global_batch; each doubling takes as many steps,
    # or tokens; percent are of train.tokens
    batch_ramp: Duration | None = key(None, wall_time=False)
    # windows per rank and forward pass; gradient accumulation follows from it
    micro_batch: int = key(4, kind="numerics", ge=1, common=True)
    seed: int = key(1337, ge=0, common=True)  # seed of initial weights, data order and dropout
    init_seed: int | None = key(None, ge=0)  # seed of the initial weights; null: train.seed
    # torch.compile; auto: on if there is a compiler
    compile: Literal["auto", "on", "off"] = key("auto", kind="numerics")
    # part of their activations that compiled blocks keep, 0 to 1: the backward pass makes the rest
    # again, the cheapest first; null: torch's own choice
    activation_memory_budget: float | None = key(None, kind="numerics", ge=0, le=1)
    # On by default: exact resumption is what a run is for, and only then does the self-check see a
    # single wrong bit. Of the speed a part of attention's backward pass is lost.

    # exact: kernels that give the same bits each time, or an error; false: fast, and exact up to
    # rounding only. A CPU is exact either way
    deterministic: bool = key(True, kind="numerics")
    # flash attention on a GPU: torch: its own kernels; fa3: those of the package flash-attn-3
    # (Hopper); fa4: of flash-attn-4 (Hopper, Blackwell). Exact ones too, if deterministic
    attention_kernel: Literal["torch", "fa3", "fa4"] = key("torch", kind="numerics")
    # the same losses, norms, weights and moments, to the last bit, on any number of ranks that feed
    # windows; gradients are rounded to units of which fp32 adds up any number without an error
    invariant: bool = key(False, kind="numerics")

    @property
    def _lengths(self) -> list[str]:
        lengths = {"train.steps": self.steps, "train.tokens": self.tokens}
        return [name for name, value in lengths.items() if value is not None]

    @property
    def has_length(self) -> bool:
        """Whether steps and their tokens can be counted."""
        return len(self._lengths) == 1 and self.global_batch > 0

    def by_rule(self, parameters: int | None) -> Self:
        """Return it with the length and the batch that are to follow from others.

        parameters: of the model's layers, None if they aren't known. A batch is a power of two in
        windows, so that micro-batches and ranks divide it, and a micro-batch at least.
        """
        train = self
        if train.tokens_per_parameter is not None and parameters and not train._lengths:
            tokens = round(train.tokens_per_parameter * parameters)
            train = replace(train, tokens=tokens, tokens_per_parameter=None)
        if train.global_batch == 0 and train.tokens:
            scale, power = STEP_LAW_BATCH
            windows = scale * train.tokens**power / train.sequence_length
            batch = 2 ** max(0, round(math.log2(windows)))
            train = replace(train, global_batch=max(batch, train.micro_batch))
        return train

    def problems(self) -> ProblemIterator:
        if self.tokens_per_parameter is not None:
            problem, todo = "needs a model of ours, whose layers are known", "give train.tokens"
            if self._lengths:
                problem = f"can't be combined with {' and '.join(self._lengths)}"
                todo = "give one of them"
            yield "tokens_per_parameter", problem, todo
        elif not self._lengths:
            yield "steps", "the run has no length", "give train.steps or train.tokens"
        if self.global_batch == 0:
            todo = "give train.tokens, or the windows"
            yield "global_batch", "follows from a length in tokens", todo
        if len(self._lengths) == 2:
            todo = "set one of them to null, such as train.tokens=null"
            yield "steps", "can't be combined with train.tokens", todo
        if self.activation_memory_budget is not None and self.compile == "off":
            problem, todo = "is for blocks that are compiled", "leave it out, or train.compile=auto"
            yield "activation_memory_budget", problem, todo
        if self.global_batch % self.micro_batch:
            problem = f"{self.global_batch} windows are not a multiple of the micro-batch"
            todo = "change train.global_batch or train.micro_batch"
            yield "global_batch", f"{problem}, {self.micro_batch}", todo
        yield from length_ramp_problems(self)
        yield from batch_ramp_problems(self)
