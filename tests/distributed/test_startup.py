"""At stage 3 no rank ever holds the whole model: peak memory while it is built, of real ranks."""

import re
from pathlib import Path

import pytest

from forescale.plan.bytes.memory import memory
from forescale.plan.bytes.parameters import inventory
from tests.distributed import ranks
from tests.distributed.jobs import TRAIN, VOCABULARY, compose_job

pytestmark = pytest.mark.distributed

WORDS = ["engine=zero3", "optimizer=adamw", "model.width=1024", "model.num_layers=12"]
WORDS += ["model.num_heads=16"]
REST = 60 << 20  # of libraries and of the allocator, which this leaves


def test_the_initial_model_is_that_of_one_process():
    words = ["engine=zero3", "model.mtp_layers=1", "model.mlp=moe", "model.num_layers=4"]
    words += [
        "model.mixer_pattern=[lstm,gated_deltanet,latent,attention]",
        "model.position=learned",
    ]
    assert ranks.run("test_startup:differing", 2, 280, overrides=words) == []


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_divide_a_model_while_it_is_built(size):
    job = job_of(size, WORDS)
    held = inventory(job)
    planned = memory(job, held, size)
    grown = ranks.run("test_startup:start", size, 280, overrides=WORDS)
    # Here the host is also the device: a rank's weights, and the part that is drawn, in fp32 and
    # rounded to bf16.
    most = planned.states.weights + planned.start * 3 // 2 + REST
    assert max(grown) < most < 4 * held.numel * (0.6 if size == 2 else 0.45)
    assert min(grown) > planned.states.weights // 2


# Inside the ranks.


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
