"""Adapters on two real ranks: they go on to the bit, at any stage they learn the same, all else
stays as it was, and another run begins with what they have become."""

import pytest
import torch

from forescale import open_run
from forescale.checkpoint.reader import Checkpoint
from forescale.models.adapters import is_adapter
from tests import launching
from tests.matrix import full_only

pytestmark = pytest.mark.distributed

LENGTH = ("train.tokens=null", "train.steps=8", "checkpoint.every=4", "validation.every=8")
LORA = ("lora.rank=4", "lora.dropout=0.1", "optimizer=adamw", "run.from.load=weights")
TWO = ("launch.processes=2", "train.micro_batch=2")


def last(run):
    return Checkpoint(max((run / "checkpoints").glob("step-????????")))


def flops(run):
    return open_run(run).metrics()["flops_full"].iloc[-1]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param(0, "bf16", marks=full_only),
        (1, "bf16"),
        pytest.param(2, "bf16", marks=full_only),
        (3, "fp32"),
    ],
)
def test_they_resume_bit_for_bit_and_freeze_all_else(dataset, tmp_path, stage, precision):
    data = (f"data.path={dataset}", *LENGTH, f"precision={precision}")
    launching.train(tmp_path, "run.name=base", *data)
    lora = (*data, *LORA, f"run.from.run={tmp_path / 'base'}", f"engine=zero{stage}")
    if stage == 3:  # is compared with one rank, which would drop others
        lora += ("lora.dropout=0",)
    whole, again = launching.whole_and_repeated(tmp_path, *lora, *TWO, step=4)
    assert len(whole) == 8
    assert again == whole
    assert flops(tmp_path / "whole") < flops(tmp_path / "base")
    base, adapted = last(tmp_path / "base"), last(tmp_path / "whole")
    assert {n for n in adapted.shapes if not is_adapter(n)} == base.shapes.keys()
    rounding = 2**-8 if precision == "bf16" else 0.0  # the engine keeps them in its precision
    for name in base.shapes:
        torch.testing.assert_close(adapted.tensor(name), base.tensor(name), rtol=rounding, atol=0)
    ups = [name for name in adapted.shapes if name.endswith("lora_B.weight")]
    assert len(ups) == 14
    assert all(adapted.tensor(name).abs().max() > 0 for name in ups)
    if stage != 3:
        return
    alone = ("run.name=alone", "engine=zero0", "launch.processes=1", "train.micro_batch=8")
    launching.train(tmp_path, *lora, *alone)
    one = launching.trajectory(tmp_path / "alone")
    assert whole[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=1e-4)
    still = ("optimizer.learning_rate=1e-30", "optimizer.adam_learning_rate=1e-30")
    onward = ("run.name=onward", f"run.from.run={tmp_path / 'whole'}", "run.from.load=weights")
    launching.train(tmp_path, *data, *onward, *still, *TWO, "engine=zero3")
    merged, onward = (open_run(tmp_path / name).model() for name in ("whole", "onward"))
    with torch.no_grad():
        first, second = (model(torch.arange(32)[None]) for model in (merged, onward))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
