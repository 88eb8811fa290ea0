"""The least that one process does until it has made a step with DeepSpeed: imports, the job's
model, an engine, a compiled step over tokens that are all alike. No launcher, data, checks or rows.

    python -m tests.benchmarks.bare_start CONFIG     # a frozen job with a resolved model

Prints, when the step is done, the seconds that each part took, as a line of JSON.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.verbs.train import first_imports


def main(config: str) -> None:
    clock = [time.monotonic()]
    job = thaw(TrainJob, Path(config))
    with first_imports():
        from forescale.engine.world import set_environment

        set_environment()
        import deepspeed
        import torch

        from forescale.engine.compilation import compiler_missing, probe_here, reuse_graphs
        from forescale.engine.deepspeed_config import deepspeed_config
        from forescale.engine.optim import build_optimizer, parameter_groups
        from forescale.engine.world import _quiet_deepspeed
        from forescale.models import Transformer

    clock.append(time.monotonic())
    _quiet_deepspeed()
    deepspeed.init_distributed("gloo")
    model = Transformer(job.model)
    groups = parameter_groups(model.named_parameters(), job.optimizer, model.muon_parameters())
    optimizer = build_optimizer(job.optimizer, [group.as_dict() for group in groups])
    config_of_engine = deepspeed_config(job, 1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of_engine)
    if job.train.compile != "off" and compiler_missing() is None:
        reuse_graphs()
        probe_here()
        engine.compile()
    clock.append(time.monotonic())
    tokens = torch.zeros(job.train.micro_batch, job.train.sequence_length, dtype=torch.long)
    engine.backward(engine(tokens, tokens).sum() / tokens.numel())
    engine.step()
    clock.append(time.monotonic())
    parts = [after - before for before, after in pairwise(clock)]
    print(json.dumps(dict(zip(("imports", "engine", "step"), parts, strict=True))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
