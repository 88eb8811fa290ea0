"""The main command on two real ranks: every ZeRO stage goes on to the bit after a kill, every part
of a model from a checkpoint. (At another stage and world size: test_sequence.py.)

Each stage with one of the optimizers, in turns; FORESCALE_MATRIX=full takes both. (What of an
optimizer is saved and loaded at each stage is in test_state.py, to the bit.)
"""

import pytest

from tests import launching
from tests.matrix import FULL, full_only

pytestmark = pytest.mark.distributed

LENGTH = ("train.tokens=null", "train.steps=50", "checkpoint.every=10", "validation.every=50")
TWO = ("launch.processes=2", *LENGTH)


KINDS = [(stage, optimizer) for stage in range(4) for optimizer in ("muon", "adamw")]
CHOSEN = KINDS if FULL else [KINDS[i] for i in (1, 2, 4, 7)]
# What attention alone can have.
OF_ATTENTION = (
    "model.position=alibi",
    "model.mixer.value_residual=0.5",
    "model.mixer.gate=channel",
    "model.mixer.qk_norm=layer",
    "model.norm.placement=sandwich",
    "model.head.softcap=30",
    "data.document_mask=true",
)


@pytest.mark.parametrize(("stage", "optimizer"), CHOSEN)
def test_two_ranks_resume_bit_for_bit(dataset, tmp_path, stage, optimizer):
    command = (f"data.path={dataset}", *TWO, f"engine=zero{stage}", f"optimizer={optimizer}")
    command += ("train.steps=24", "checkpoint.every=5", "validation.every=24")
    command += ("model.dropout=0.1",)  # whose randomness must repeat too
    command += ("train.first_batch=4", "train.batch_ramp='16 steps'")  # the kill is before its end
    command += OF_ATTENTION if stage == 2 else ()
    whole, cut = launching.whole_and_resumed(tmp_path, *command, step=14, cold=stage == 2)
    assert [row["g1"] for row in whole] == [*range(4, 65, 4), *range(72, 129, 8)]
    assert cut == whole


# Every mixer in one model, with experts whose biases are counted and a module that predicts later
# tokens. Attention is in the tests above.
ALL_PARTS = (
    "model.num_layers=6",
    "model.mixer_pattern=[lstm,mingru,gated_deltanet,latent,{kind: window, window: 8},attention]",
    "model.mlp=moe",
    "model.mlp.scores=sigmoid",
    "model.mlp.bias_speed=0.01",
    "model.mlp.dense_layers=1",
    "model.mtp_layers=1",
    "train.compile=off",
)


@pytest.mark.timeout(900)  # six kinds of layers, none of them compiled
@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [(3, "muon"), *(pytest.param(*kind, marks=full_only) for kind in KINDS if kind != (3, "muon"))],
)
def test_a_model_of_all_parts_repeats_its_steps_bit_for_bit(dataset, tmp_path, stage, optimizer):
    command = (f"data.path={dataset}", *TWO, f"engine=zero{stage}", f"optimizer={optimizer}")
    command += (*ALL_PARTS, "data.document_mask=true", "train.steps=8", "validation.every=8")
    command += ("checkpoint.every=3",)
    whole, again = launching.whole_and_repeated(tmp_path, *command, step=3, cold=True)
    assert len(whole) == 8
    assert again == whole


def test_a_model_of_divided_experts_repeats_its_steps_bit_for_bit(dataset, tmp_path):
    """With held-out losses, for which all ranks of a group call the model equally often."""
    command = (f"data.path={dataset}", *TWO, "engine=zero1", "engine.expert_parallel=2")
    command += ("model.mlp=moe", "model.mlp.scores=sigmoid", "model.mlp.bias_speed=0.01")
    command += ("train.steps=8", "validation.every=8", "checkpoint.every=3", "train.compile=off")
    whole, again = launching.whole_and_repeated(tmp_path, *command, step=3)
    assert len(whole) == 8
    assert again == whole


def test_a_run_whose_rows_grow_repeats_its_steps_bit_for_bit(dataset, tmp_path):
    """Compiled, and resumed where rows are whole: it never met the shorter ones."""
    command = (f"data.path={dataset}", *TWO, "engine=zero2", "train.compile=on", "train.steps=8")
    command += ("train.first_length=8", "train.length_ramp=4", "data.document_mask=true")
    command += ("checkpoint.every=5", "validation.every=8")
    whole, again = launching.whole_and_repeated(tmp_path, *command, step=5)
    assert again == whole
    per_token = [row["flops_causal"] / row["tokens"] for row in launching.rows(tmp_path / "whole")]
    assert sorted(per_token) == per_token
    assert len({*per_token[:2]}) == 1 < len({*per_token[:4]})  # of shorter rows fewer FLOPs


def test_a_decay_branches_off_a_run(dataset, tmp_path):
    """run.from: the branch keeps g, and repeats the trunk until its own decay begins."""
    trunk = ("run.name=trunk", f"data.path={dataset}", *LENGTH, "schedule.decay=0")
    launching.train(tmp_path, *trunk, "checkpoint.keep=5")
    branch = ("run.name=branch", f"data.path={dataset}", *LENGTH, "train.steps=40")
    branch += ("schedule=wsd", "schedule.warmup=2", "schedule.decay=15", "run.from.run=trunk")
    launching.train(tmp_path, *branch, "run.from.step=20", "validation.every=40")
    rows = launching.rows(tmp_path / "branch")
    assert [row["step"] for row in rows] == list(range(21, 41))
    before = launching.trajectory(tmp_path / "trunk")[20:25]
    assert launching.trajectory(tmp_path / "branch")[:5] == before
    assert rows[-1]["learning_rate"]["muon"] < rows[0]["learning_rate"]["muon"] / 10
