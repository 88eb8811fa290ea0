"""Checkpoints of every mesh: what one saves, every other loads, element by element."""

import pytest
import torch

from forescale.checkpoint.reader import Checkpoint, coverage_faults
from tests.distributed import ranks
from tests.distributed.mesh_scenarios import STATE

pytestmark = pytest.mark.distributed

MODEL = [
    "model.num_kv_heads=2",
    "model.mlp_width=42",
    "model.vocab_size=72",
    "model.mixer.qk_norm=head",
]
MODEL += ["model.position=relative", "optimizer=muon"]  # which leaves tables to AdamW
TENSOR = "engine.tensor_parallel=2"
DROPS = ["drops-1", 1, 1, TENSOR, "model.dropout=0.2"]
COPIES = ["copies-3", 1, 3, "engine.shard_group=2"]
MESHES = {  # by the number of ranks: name, sequence ranks, stage, more
    1: [["one", 1, 1]],
    2: [["tensor-1", 1, 1, TENSOR], ["tensor-3", 1, 3, TENSOR], ["sequence-2", 2, 2], DROPS],
    4: [["all-3", 2, 3, TENSOR], ["data-2", 1, 2, TENSOR], ["bare-0", 1, 0, TENSOR], COPIES],
}


def test_every_mesh_loads_every_other_and_continues_its_own_to_the_bit(tmp_path):
    losses = {}
    for size in (4, 2, 1, 2, 4):  # on the way back, what was not saved yet on the way there
        cases = [[*case, *MODEL] for case in MESHES[size]]
        arguments = {"cases": cases, "folder": str(tmp_path), "known": losses}
        losses |= ranks.run("mesh_scenarios:carry", size, **arguments)
    names = [name for cases in MESHES.values() for name, *_ in cases]
    first = {name: Checkpoint(tmp_path / "first" / name / STATE) for name in names}
    assert not any(
        coverage_faults(checkpoint.shapes, checkpoint.fragments) for checkpoint in first.values()
    )
    pairs = [key.split("<") for key in losses if "<" in key]
    assert sorted(pairs) == sorted([a, b] for a in names for b in names)
    for target, source in pairs:
        again = Checkpoint(tmp_path / "again" / f"{target}<{source}" / STATE)
        old = first[source]
        assert again.shapes == old.shapes
        for name in old.shapes:
            for state in old.reader.states(name):
                assert torch.equal(again.tensor(name, state), old.tensor(name, state))
        after, expected = losses[f"{target}<{source}"], losses[source]
        if target == source:
            assert after == expected
        elif DROPS[0] in (target, source):  # others draw other numbers
            continue
        for row, plain in zip(after, expected, strict=True):
            assert row == pytest.approx(plain, rel=1e-5), (target, source)
