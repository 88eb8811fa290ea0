"""How often a rank waits for its device in a step, counted where there is none: reads of a tensor's
value, copies to the host and calls to synchronize, on two real ranks."""

import traceback
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import ranks, small

pytestmark = pytest.mark.distributed

# The step's loss and norm, on which the guard decides before the update; the summary of the step
# before, which a GPU has copied to the host by then (World._late_read).
EXPECTED = {"tolist in step.py:measure": 1, "tolist in world.py:read": 1}
# At stage 3 DeepSpeed looks whether the norm that it receives is a number: it is on the host.
STAGE_3 = {"utils.py:is_invalid_grad_norm": 1}


def test_a_step_waits_for_its_norm_and_the_summary_before_it():
    cases = [[stage, kind, "bf16"] for stage in range(4) for kind in ("adamw", "muon")]
    results = ranks.run("test_waits:waits", 2, 280, cases=cases)
    for case, counted in zip(cases, results, strict=True):
        assert counted == (EXPECTED | STAGE_3 if case[0] == 3 else EXPECTED), case


# Inside the ranks.


class _Reads(TorchDispatchMode):
    """Counts operations that read a value, by the file that asks: on a GPU each waits for it."""

    def __init__(self, counter: Counter):
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.counter[_where()] += 1
        return function(*args, **(kwargs or {}))


def _where() -> str:
    frames = reversed(traceback.extract_stack())
    inside = ("/torch/", "test_waits")
    frame = next(f for f in frames if not any(part in f.filename for part in inside))
    return f"{frame.filename.rpartition('/')[2]}:{frame.name}"


def waits(cases):
    """For each case, how often one step reads from the device or waits for it, by place."""
    from deepspeed.accelerator import get_accelerator

    counter: Counter = Counter()

    def counted(owner, name):
        original = getattr(owner, name)

        def method(*args, **kwargs):
            counter[f"{name} in {_where()}"] += 1
            return original(*args, **kwargs)

        setattr(owner, name, method)

    counted(torch.Tensor, "tolist")
    counted(torch.Tensor, "cpu")
    counted(torch.Tensor, "numpy")
    counted(get_accelerator(), "synchronize")
    results = []
    for stage, optimizer, precision in cases:
        engine = small.build(stage, optimizer, precision, clip=1.0)
        world = engine.world
        for step in range(4):
            counter.clear()
            data = small.batch(step, world.rank, world.size, 4)
            with _Reads(counter):
                facts = engine.train_step(data, 1.0)
                first = data.micro[0].index
                world.share(step, facts.losses, first, 4, 0, False)
                list(world.summaries(behind=1))
        results.append(dict(counter))
    return results
