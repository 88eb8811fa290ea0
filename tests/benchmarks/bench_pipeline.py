"""The share of a step in which the stages of a pipeline wait, of each schedule against 1F1B. It
counts the passes of a simulated step, so it is the same on every machine.
"""

from forescale.engine.parallel.schedules import order_of
from tests.benchmarks.pairing import Result

REAL = ((4, 16), (8, 32), (16, 64))  # stages, micro-batches of a rank
TOY = ((2, 4),)
OTHERS = (("interleaved", 2), ("interleaved", 4), ("zero-bubble", 1))  # with so many parts a stage


def measure(rounds: int, sizes: tuple[tuple[int, int], ...] = REAL) -> list[Result]:
    results = []
    for stages, micros in sizes:
        plain = order_of("1f1b", stages, 1, micros)
        for schedule, chunks in OTHERS:
            order = order_of(schedule, stages, chunks, micros)
            name = f"idle, {stages} stages, {micros} micro-batches, parts a stage {chunks}"
            held = {"1f1b": plain.in_flight(0), schedule: order.in_flight(0) / chunks}
            facts = {"micro-batches whose activations the first stage holds": held}
            pair = [(order.bubble, plain.bubble)]
            results.append(Result(name, "of a step", (schedule, "1f1b"), pair, facts=facts))
    return results
