"""What runs inside the ranks of test_pipeline.py: models over the stages of a pipeline."""

from tests.distributed.sequence_scenarios import build, checked, trained


def everything(cases, healthy, steps):
    """What `trained` returns of each case; what `checked` and `dropped` return of others."""
    return [trained(cases, 1, steps, documents=True), checked(healthy, 1), dropped(healthy)]


def dropped(cases):
    """For each case, the rows of three steps, and of the same with gradients dropped between."""
    from tests.distributed.jobs import batch, steps_of

    results = []
    for case in cases:
        plain, engine, rows = steps_of(build(case, 1), range(3)), build(case, 1), []
        data = engine.world.data
        for step in range(3):
            for other in (90, 91):
                losses = engine.backward(batch(other + step, data.rank, data.size))
                engine.measure(losses, 1)
                engine.drop()
                assert engine.pipeline.later == [], "activations that outlive a step"
            rows += steps_of(engine, [step])
        results.append([plain, rows])
    return results
