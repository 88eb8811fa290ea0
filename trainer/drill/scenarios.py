"""The scenarios of `forescale drill`: the faults of a run, and its expected behaviour.

Invariant: data only. runner.py runs the scenarios, judge.py judges them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from forescale.config.sections.faults import read
from forescale.config.suggest import nearest_first
from forescale.ground.errors import DONE, INTERRUPTED, USER

STEPS = 40
BASE = (  # settings of every run of a drill
    *("model.num_layers=2", "model.width=32", "model.num_heads=2", "model.mlp_width=64"),
    *("train.sequence_length=32", "train.global_batch=8", "train.micro_batch=2"),
    *(f"train.steps={STEPS}", "train.compile=off", "schedule.warmup=2", "schedule.decay=20%"),
    *("validation.windows=8", f"validation.every={STEPS}", "checkpoint.every=10 steps"),
    "logging.every=1 step",  # so that the time of a line is the time of its step
    # A step takes 20 ms, so heartbeats must be short: at this patience 0.1 s.
    *("heartbeat.patience=4 s", "heartbeat.startup=1 min"),
)
_WATCHED = ("guard.warmup=8", "guard.window=16")
# Without ZeRO every rank keeps its own weights, so a flipped bit stays until it is detected.
_REPLICAS = ("engine=zero0", "precision=fp32")

Rows = Literal["same", "skipped", "rolled back"]


@dataclass(frozen=True)
class Scenario:
    """A run with injected `faults`, compared with a run without faults.

    settings: overrides of both runs; overrides: of the faulty run alone. codes: the expected exit
    code of each command; the command runs once for each. signal_at: the command gets SIGTERM after
    this step. noticed: a pattern that an output line or an event (its kind, then its JSON) matches
    once `by` has noticed the fault. rows: "same" expects rows equal to the last bit; "skipped"
    expects one dropped update; "rolled back" expects the rows of a fresh run that skips the samples
    which this run rolled back from.
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
        """The faults in the format of the run's records."""
        return [str(read(text)) for text in self.faults]

    @property
    def first_step(self) -> int:
        return self.signal_at or min(read(text).step for text in self.faults)


_HANG = (r'^forescale: hang: rank 1\b|^hang .*"ranks": \[1\]', "the watchdog")

SCENARIOS = (
    Scenario(
        "kill", "a rank is killed", ("kill@25:rank1",), "^rank 1 ended with SIGKILL", "the launcher"
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
        "freeze-norm", "a rank freezes before a collective", ("freeze@25:rank1:norm",), *_HANG
    ),
    Scenario("hang", "a rank waits for its data forever", ("hang@25:rank1:data",), *_HANG),
    Scenario("crash", "a rank crashes", ("exit@25:rank1",), "^rank 1 ended with ", "the launcher"),
    Scenario(
        "nan-skip",
        "a gradient is not a number",
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
        ("heartbeat.patience=2 s",),  # it is slow for two seconds
    ),
    Scenario(
        "term",
        "SLURM sends SIGTERM",
        (),
        "^Stopped at step",
        "the ranks",
        codes=(INTERRUPTED, DONE),
        signal_at=12,
    ),
)
BY_NAME = {s.name: s for s in SCENARIOS}


def problems(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return a problem for each name that is not a scenario."""
    unknown = []
    for name in names:
        if name not in BY_NAME:
            near = ", ".join(nearest_first(name, BY_NAME))
            unknown.append(("scenarios", f"{name!r} is not a scenario", f"choose some of {near}"))
    return unknown
