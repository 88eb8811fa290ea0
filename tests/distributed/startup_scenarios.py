"""Scenarios on real ranks: what the start of a model takes of the host's memory."""

import re
from pathlib import Path

from tests.distributed.jobs import TRAIN, VOCABULARY, compose_job


def job_of(size, overrides):
    words = [*TRAIN, f"train.global_batch={size}", "train.micro_batch=1", "precision=bf16"]
    return compose_job([*words, *overrides], size)


def start(overrides):
    """Bytes by which the peak of each rank's memory grows while the model is built."""
    import os

    from forescale.engine.build import partition_of
    from forescale.engine.deepspeed_config import deepspeed_config
    from forescale.engine.world import join
    from forescale.train.model import build_model

    size = int(os.environ["WORLD_SIZE"])
    job = job_of(size, overrides)
    world = join(deepspeed_config(job, size), size, 60)
    build_model(job_of(size, SMALL), VOCABULARY)  # what only the first model imports
    before = _peak()
    build_model(job, VOCABULARY, partition_of(job, world))
    return world.gather(_peak() - before)


def _peak() -> int:
    """The most bytes that this process has had: a ru_maxrss would be that of its parent, where the
    parent is larger."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) << 10


def differing(overrides):
    """The names of the parameters whose initial weights, divided and gathered again, aren't those
    that one process draws, rounded to bf16."""
    import os

    import deepspeed
    import torch

    from forescale.engine.build import partition_of
    from forescale.engine.deepspeed_config import deepspeed_config
    from forescale.engine.world import join
    from forescale.train.model import build_model

    size = int(os.environ["WORLD_SIZE"])
    job = job_of(size, overrides)
    world = join(deepspeed_config(job, size), size, 60)
    plain = dict(build_model(job, VOCABULARY).bfloat16().named_parameters())
    divided = dict(build_model(job, VOCABULARY, partition_of(job, world)).named_parameters())
    assert plain.keys() == divided.keys()
    assert all(not p.numel() for p in divided.values()), "a parameter is whole"
    with deepspeed.zero.GatheredParameters(list(divided.values())):
        return [name for name, p in divided.items() if not torch.equal(p, plain[name])]


SMALL = ["model.width=64", "model.num_layers=1", "model.num_heads=1"]
