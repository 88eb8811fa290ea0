"""The jobs that test_real_costs.py prices, the same inside the ranks and outside."""

from dataclasses import replace

from forescale.config.train import TrainJob

VOCABULARY, LENGTH, MICRO_BATCHES = 71, 16, 3
FLAGS = 100  # bytes: most of norms and flags, which are of no kind
# Odd sizes: partition borders cut parameters, and nothing divides by the ranks.
MODEL = ["model.width=24", "model.num_layers=2", "model.num_heads=3", "model.mlp_width=41"]
TRAIN = ["train.steps=4", "schedule.warmup=0", "schedule.decay=1", "train.micro_batch=2"]


def job_of(case, world):
    """case: [stage, optimizer, precision, more overrides]."""
    from forescale.config.compose import compose

    stage, optimizer, precision, *words = case
    near = {"engine.tensor_parallel=2", "engine.sequence_parallel=2"} & set(words)
    fed = world // 2 ** len(near)
    overrides = [
        *MODEL,
        *TRAIN,
        f"train.sequence_length={LENGTH}",
        f"train.global_batch={2 * MICRO_BATCHES * fed}",
        f"engine=zero{stage}",
        "engine.bucket_bytes=4096",
        f"precision={precision}",
        f"optimizer={optimizer}",
        *words,
    ]
    job = compose(TrainJob, [*overrides, f"launch.processes={world}"])
    return replace(job, model=job.model.resolved(VOCABULARY, LENGTH))
