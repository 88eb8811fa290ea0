"""The scenarios of `forescale drill`, a row each: what happens to a run, and what is right then.

Invariant: data only. drill.py runs them, verdict.py judges.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from forescale.config.faults import read
from forescale.config.suggest import nearest_first
from forescale.errors import DONE, INTERRUPTED, USER

STEPS = 40
BASE = (  # of every run of a drill
    *("model.num_layers=2", "model.width=32", "model.num_heads=2", "model.mlp_width=64"),
    *("train.sequence_length=32", "train.global_batch=8", "train.micro_batch=2"),
    *(f"train.steps={STEPS}", "train.compile=off", "schedule.warmup=2", "schedule.decay=20%"),
    *("validation.windows=8", f"validation.every={STEPS}", "checkpoint.every=10 steps"),
    "logging.every=1 step",  # when a line comes is when its step was made
    # A step takes 20 ms: the last beat of a rank that freezes must be from after the first one.
    *("pulse.patience=4 s", "pulse.beat=0.1 s", "pulse.share=1 s", "pulse.startup=1 min"),
)
_WATCHED = ("guard.warmup=8", "guard.window=16")
# Without ZeRO every rank keeps weights of its own, so that a flipped bit stays until it is found.
_REPLICAS = ("engine=zero0", "precision=fp32")

Rows = Literal["same", "skipped", "rolled back"]


@dataclass(frozen=True)
class Scenario:
    """`faults` strike a run, in which `overrides` hold too; `settings` hold in the undisturbed run
    that it is compared with as well.

    codes: what the command ends with, given again after each but the last; signal_at: it gets
    SIGTERM as soon as this step is made. noticed: what a line of the output or an event (its kind,
    then its JSON) matches as soon as `by` has noticed the fault. rows: the same bit for bit as the
    undisturbed run's; or as right after one update was skipped; or the same as those of a fresh run
    that is told to pass over the samples that this one went back from.
    """

    name: str
    title: str
    faults: tuple[str, ...]
    noticed: str
    by: str
    overrides: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    codes: tuple[int, ...] = (DONE,)
    signal_at: int | None = None
    rows: Rows = "same"

    @property
    def strikes(self) -> list[str]:
        """The faults as the run records them."""
        return [str(read(text)) for text in self.faults]

    @property
    def first_step(self) -> int:
        """The step that the first fault strikes."""
        return self.signal_at or min(read(text).step for text in self.faults)


_HANG = (r'^forescale: hang: rank 1\b|^hang .*"ranks": \[1\]', "the watchdog")

SCENARIOS = (
    Scenario(
        "kill",
        "a rank is killed",
        ("kill@25:rank1",),
        "^rank 1 ended with SIGKILL",
        "the launcher",
    ),
    Scenario(
        "kill-save",
        "a rank is killed while it saves",
        ("kill@20:rank1:write",),
        "^rank 1 ended with SIGKILL",
        "the launcher",
    ),
    Scenario("freeze-data", "a rank freezes while it reads", ("freeze@25:rank1:data",), *_HANG),
    Scenario(
        "freeze-norm",
        "a rank freezes before a collective",
        ("freeze@25:rank1:norm",),
        *_HANG,
    ),
    Scenario("hang", "a rank waits for its data for ever", ("hang@25:rank1:data",), *_HANG),
    Scenario(
        "crash",
        "a rank crashes",
        ("exit@25:rank1",),
        "^rank 1 ended with ",
        "the launcher",
    ),
    Scenario(
        "nan-skip",
        "a gradient is no number",
        ("nan@25:rank1",),
        "^update_dropped",
        "the guard",
        ("guard.non_finite=skip",),
        rows="skipped",
    ),
    Scenario(
        "spike-rollback",
        "a gradient is 1000 times too large",
        ("spike@25:rank1",),
        "^rollback",
        "the guard",
        ("guard.gradient_spike=rollback", "guard.back=0", *_WATCHED),
        rows="rolled back",
    ),
    Scenario(
        "flip",
        "a bit of the weights flips in memory",
        ("flip@33:rank1",),
        "^silent_corruption",
        "the comparison of weights",
        ("guard.replay=10 steps", "guard.corruption=rollback", "checkpoint.keep=3"),
        _REPLICAS,
    ),
    Scenario(
        "damage",
        "the newest checkpoint is damaged",
        ("corrupt@25", "kill@26"),
        "^checkpoint_damaged",
        "the checksums",
        ("checkpoint.background=false",),
    ),
    Scenario(
        "disk",
        "the disk fills up while it saves",
        ("enospc@20",),
        "forescale: .*the disk is full",
        "the write",
        codes=(USER, DONE),
    ),
    Scenario(
        "slow",
        "a rank is slow",
        ("slow@15:rank1",),
        '^straggler .*"rank": 1\\b',
        "the watchdog",
        ("pulse.share=0.3 s",),  # it is slow for two seconds
    ),
    Scenario(
        "term",
        "the queue wants the nodes back",
        (),
        "^Stopped at step",
        "the ranks",
        codes=(INTERRUPTED, DONE),
        signal_at=12,
    ),
)
BY_NAME = {s.name: s for s in SCENARIOS}


def problems(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """What is wrong with a choice of scenarios, a sentence each."""
    found = []
    for name in names:
        if name not in BY_NAME:
            near = ", ".join(nearest_first(name, BY_NAME))
            found.append(("scenarios", f"no such scenario, {name!r}", f"choose of {near}"))
    return found
