"""What runs inside the ranks of test_invariant.py."""

import hashlib

from forescale.engine.state import owned_fragments
from tests.distributed import jobs, sequence_scenarios, small


def trained(cases, steps):
    """For each [stage, optimizer, precision, offload], losses and norms of all steps, each of ten
    micro-batches, and a hash of each weight and moment at the end."""
    results = []
    for case in cases:
        stage, optimizer, precision, offload = case
        engine = small.build(
            stage, optimizer, precision, 2.0, offload, gradients="fp32", invariant=True
        )
        rows = small.train(engine, range(steps), lambda step: 10)
        results.append([rows, hashes(engine)])
    return results


def divided(cases, near):
    """The same of our own model with dropout, on ranks that divide windows or matrices. cases:
    [stage, more overrides]; near: ranks that divide the windows."""
    results = []
    for case in cases:
        words = [*case, "model.mlp_width=42", "model.dropout=0.1", "train.invariant=true"]
        engine = sequence_scenarios.build(words, near)
        results.append([jobs.steps_of(engine, range(4)), hashes(engine)])
    return results


def hashes(engine):
    """A hash of each weight and moment, by name, of all ranks' parts; of a matrix that ranks divide
    by its columns, of each rank's columns."""
    states = [
        [f"{f.name} {f.state} {f.cut or ''}", f.start, f.data.float().numpy().tobytes().hex()]
        for f in owned_fragments(engine)
    ]
    values: dict[str, str] = {}
    for name, _, text in sorted(state for each in engine.world.gather(states) for state in each):
        values[name] = values.get(name, "") + text
    return {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in values.items()}
