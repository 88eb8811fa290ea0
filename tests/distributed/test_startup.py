"""At stage 3 no rank ever holds the whole model: peak memory while it is built, of real ranks."""

import pytest

from forescale.plan.bytes.memory import memory
from forescale.plan.bytes.parameters import inventory
from tests.distributed import ranks
from tests.distributed.startup_scenarios import job_of

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
    assert ranks.run("startup_scenarios:differing", 2, 280, overrides=words) == []


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_divide_a_model_while_it_is_built(size):
    job = job_of(size, WORDS)
    held = inventory(job)
    planned = memory(job, held, size)
    grown = ranks.run("startup_scenarios:start", size, 280, overrides=WORDS)
    # Here the host is also the device: a rank's weights, and the part that is drawn, in fp32 and
    # rounded to bf16.
    most = planned.states.weights + planned.start * 3 // 2 + REST
    assert max(grown) < most < 4 * held.numel * (0.6 if size == 2 else 0.45)
    assert min(grown) > planned.states.weights // 2
