"""Scenarios on real ranks whose groups have a copy of the states each."""


def checked(cases):
    """For each case, what the self-check says of healthy copies; and after a number of rank 2's
    momentum has changed, which no weight depends on yet."""
    from forescale.engine.selfcheck import SelfCheck
    from tests.distributed.jobs import batch
    from tests.distributed.sequence_scenarios import build

    faults = []
    for case in cases:
        engine = build(case, 1)
        check, world = SelfCheck(engine, "here", exact=True), engine.world

        def look(data, losses, engine=engine, check=check):
            faults.append(check(data, losses))
            if engine.world.rank == 2:
                master = next(iter(engine.layout.units())).master
                engine.layout.base.state[master]["momentum_buffer"].view(-1)[0] += 1e-3
            faults.append(check(data, losses))

        engine.train_step(batch(0, world.data.rank, world.size), 1.0)
        engine.train_step(batch(1, world.data.rank, world.size), 1.0, before_update=look)
    return faults


def ordered(case):
    """The order of sums among replicas and of ends of backward passes in a step."""
    from forescale.engine import stages
    from tests.distributed.jobs import batch
    from tests.distributed.sequence_scenarios import build

    engine, order = build(case, 2), []
    world, o = engine.world, engine.layout.optimizer
    add, end = stages.add_replicas, o.independent_gradient_partition_epilogue
    stages.add_replicas = lambda *each: (order.append("sum"), add(*each))[1]
    o.independent_gradient_partition_epilogue = lambda: (order.append("end"), end())[1]
    engine.train_step(batch(0, world.data.rank, world.data.size), 1.0)
    stages.add_replicas = add
    return order
