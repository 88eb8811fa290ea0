"""Config section `schedule`: the learning rate of each step, as a fraction of the peak.

To add a schedule, write its class here with a line in SCHEDULES, and its defaults in
conf/schedule/NAME.yaml. Invariant: a pure function of the config and the step. So a run that
resumes, gets longer or branches off needs no scheduler state.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from forescale.config.duration import Duration
from forescale.config.schema import key


@dataclass
class ScheduleConfig:
    """The keys of every schedule.

    kind: its word. may_grow: True if the rates before the decay don't depend on the run's length.
    """

    kind: ClassVar[str]
    may_grow: ClassVar[bool] = False

    # length of the linear warm-up of the learning rate
    warmup: Duration = key(Duration(0), common=True, wall_time=False)

    @property
    def decay_length(self) -> Duration | None:
        """The length of the decay at the end of the run; None if it has no such part."""
        return None

    def rate(self, step: int, total_steps: int, warmup: int, decay: int = 0) -> float:
        """Return the learning rate of update `step` (from 0) as a fraction of the peak, in [0, 1].
        warmup, decay: in steps.

        The warm-up over W steps is linear, (step + 1) / W, so that the first rate is above 0 (Goyal
        et al. 2017, arXiv 1706.02677, section 2.2).
        """
        if step < warmup:
            return (step + 1) / warmup
        return self.rate_after_warmup(step, total_steps, warmup, decay)

    def rate_after_warmup(self, step: int, total_steps: int, warmup: int, decay: int) -> float:
        """Return the rate of a step after the warm-up, as `rate` does."""
        raise NotImplementedError


@dataclass
class ConstantConfig(ScheduleConfig):
    """The peak."""

    kind = "constant"
    may_grow = True

    def rate_after_warmup(self, step: int, total_steps: int, warmup: int, decay: int) -> float:
        return 1.0


@dataclass
class FallingConfig(ScheduleConfig):
    """The key of schedules that fall. `final` belongs to step `total_steps`, which is never run; so
    the last update has a higher rate."""

    final: float = key(0.0, ge=0, le=1)  # learning rate at the end, as a fraction of the peak


@dataclass
class CosineConfig(FallingConfig):
    """Half a period from the peak to `final` (Loshchilov & Hutter 2017, arXiv 1608.03983)."""

    kind = "cosine"

    def rate_after_warmup(self, step: int, total_steps: int, warmup: int, decay: int) -> float:
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


@dataclass
class WsdConfig(FallingConfig):
    """The peak, then linear to `final` over the last D steps.

    The name: MiniCPM, Hu et al. 2024, arXiv 2404.06395, section 4; linear: Hägele et al. 2024,
    arXiv 2405.18392. Caveat: Hägele et al. find 1 - sqrt slightly better than linear for long
    decays.
    """

    kind = "wsd"
    may_grow = True

    # length of the linear decay at the end
    decay: Duration = key(Duration(20, "percent"), wall_time=False)

    @property
    def decay_length(self) -> Duration | None:
        return self.decay

    def rate_after_warmup(self, step: int, total_steps: int, warmup: int, decay: int) -> float:
        left = min(1.0, max(0, total_steps - step) / decay) if decay else 1.0
        return self.final + (1 - self.final) * left


SCHEDULES: dict[str, type[ScheduleConfig]] = {
    cls.kind: cls for cls in (ConstantConfig, CosineConfig, WsdConfig)
}
