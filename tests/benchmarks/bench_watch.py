"""What it costs to be watched: the marks that the training thread makes in a step, and a beat of
the heart beside it.

The marks of a step are made as the loop and the engine make them, and nothing else, so what is
timed is theirs alone. A rank beats in a thread of its own: its time counts against the training
only while it holds the interpreter, so a beat's time over its interval is an upper bound.
"""

import tempfile
import time
from pathlib import Path

from pairing import Result, interleaved

STEPS = 20_000
MICRO_BATCHES = 4
STEP = 0.1  # seconds: what the shares are of


def measure(rounds: int) -> list[Result]:
    from trainer.config_care import PulseConfig
    from trainer.heartbeat import Heart
    from trainer.pulse import Pulse
    from trainer.run import Attempt

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attempts" / "0001"
        path.mkdir(parents=True)
        settings = PulseConfig()
        pulse, mirrored = Pulse("startup"), Pulse("startup")
        heart = Heart(mirrored, Attempt(path), 0, 1, settings)
        mirrored.mirror = heart.node.mirror(0)
        marks = interleaved(rounds, lambda: _marks(mirrored), lambda: _marks(pulse))
        beats = [(_beats(heart),) for _ in range(rounds)]
        heart.node.remove()
    share = sorted(row[0] for row in marks)[len(marks) // 2] / 1e6 / STEP
    every = settings.beat.seconds or 1.0
    beat = sorted(row[0] for row in beats)[len(beats) // 2] / 1e6 / every
    labels = ("with the place mirrored", "without")
    facts = {"micro-batches": MICRO_BATCHES, "share of a 100 ms step": f"{share:.4%}"}
    bound = {"share of a core at pulse.beat": f"{beat:.4%}"}
    asked = "at most 1 % of a step with all else"
    return [
        Result("marks of a step", "us", labels, marks, asked, facts),
        Result("a beat of the heart", "us", ("beat",), beats, facts=bound),
    ]


def _marks(pulse) -> float:
    """Microseconds a step."""
    began = time.perf_counter()
    for _ in pulse.each("data", range(STEPS)):
        pulse.step += 1
        with pulse("compute"):
            for _ in range(MICRO_BATCHES):
                pulse.mark("forward")
                pulse.mark("backward")
            pulse.mark("norm")
            pulse.mark("update")
        pulse.take()
        pulse.mark("word")
        for phase in ("logging", "evaluation", "checkpoint"):
            with pulse(phase):
                pass
    return (time.perf_counter() - began) / STEPS * 1e6


def _beats(heart, count: int = 500) -> float:
    """Microseconds each."""
    began = time.perf_counter()
    for _ in range(count):
        heart._tick(0.0)
    return (time.perf_counter() - began) / count * 1e6
