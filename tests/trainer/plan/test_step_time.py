"""The time of a step where ranks divide windows or matrices: each does its part, and no less."""

from forescale.config.compose import compose
from forescale.plan.config import PlanJob
from forescale.plan.plan import Plan

QUICK = ["experiment=quick", "optimizer=adamw", "train.micro_batch=2"]


def test_a_rank_whose_columns_are_one_chunk_computes_nothing_again():
    """Windows of 256 tokens in chunks of 200: of the two ranks that divide them each has 128."""

    def recomputed(*words):
        return Plan(compose(PlanJob, [*QUICK, "plan.gpus=2", *words])).per_token.recomputed

    chunks, divided = "model.mlp_chunk=200", "engine.sequence_parallel=2"
    assert recomputed(divided, chunks) == recomputed(divided) == recomputed()
    assert recomputed(chunks) > recomputed()
    assert recomputed(divided, "model.mlp_chunk=100") == recomputed(chunks)
