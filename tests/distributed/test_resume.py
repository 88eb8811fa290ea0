"""The main command on two real ranks: every ZeRO stage goes on to the bit after a kill, and at
another stage and world size with the same data.

Each stage with one of the optimizers, in turns; FORESCALE_MATRIX=full takes both. (What of an
optimizer is saved and loaded at each stage is in test_state.py, to the bit.)
"""

import signal

import pytest

from tests import launching
from tests.matrix import FULL, more

pytestmark = pytest.mark.distributed

LENGTH = ("train.tokens=null", "train.steps=50", "checkpoint.every=10", "validation.every=50")
TWO = ("launch.processes=2", *LENGTH)


KINDS = [(stage, optimizer) for stage in range(4) for optimizer in ("muon", "adamw")]
CHOSEN = KINDS if FULL else [KINDS[i] for i in (1, 2, 4, 7)]


@pytest.mark.parametrize(("stage", "optimizer"), CHOSEN)
def test_two_ranks_resume_bit_for_bit(dataset, tmp_path, stage, optimizer):
    command = (f"data.path={dataset}", *TWO, f"engine=zero{stage}", f"optimizer={optimizer}")
    command += ("train.steps=24", "checkpoint.every=5", "validation.every=24")
    command += ("model.dropout=0.1",)  # whose randomness must repeat too
    whole, cut = launching.whole_and_resumed(tmp_path, *command, step=14)
    assert len(whole) == 24
    assert cut == whole


# Every mixer in one model, with experts whose biases are counted and a module that predicts later
# tokens. Attention is in the tests above.
ALL_PARTS = (
    "model.num_layers=7",
    "model.mixer_pattern=[lstm,mingru,gated_deltanet,latent,window,block_sparse,attention]",
    "model.window=8",
    "model.sparse_block=4",
    "model.mlp=moe",
    "model.moe_scores=sigmoid",
    "model.moe_bias_speed=0.01",
    "model.moe_dense_layers=1",
    "model.mtp_layers=1",
    "train.compile=off",
)


# What attention alone can have.
OF_ATTENTION = (
    "model.position=alibi",
    "model.value_residual=0.5",
    "model.attention_gate=channel",
    "model.qk_norm_over=layer",
    "model.norm_placement=sandwich",
    "model.logit_softcap=30",
)
CHOICES = [(parts, *kind) for parts in (ALL_PARTS, OF_ATTENTION) for kind in KINDS]
OFTEN = [(ALL_PARTS, 3, "muon"), (OF_ATTENTION, 2, "adamw")]


@pytest.mark.timeout(900)  # seven kinds of layers, none of them compiled
@pytest.mark.parametrize(
    ("parts", "stage", "optimizer"),
    [*OFTEN, *(pytest.param(*c, marks=more) for c in CHOICES if c not in OFTEN)],
    ids=lambda value: {ALL_PARTS: "all", OF_ATTENTION: "attention"}.get(value),
)
def test_a_model_of_all_parts_resumes_bit_for_bit(dataset, tmp_path, parts, stage, optimizer):
    command = (f"data.path={dataset}", *TWO, f"engine=zero{stage}", f"optimizer={optimizer}")
    command += (*parts, "data.document_mask=true", "train.steps=8", "validation.every=8")
    command += ("checkpoint.every=3",)
    whole, cut = launching.whole_and_resumed(tmp_path, *command, step=5)
    assert len(whole) == 8
    assert cut == whole


def test_a_model_of_divided_experts_resumes_bit_for_bit(dataset, tmp_path):
    """With held-out losses, for which all ranks of a group call the model equally often."""
    command = (f"data.path={dataset}", *TWO, "engine=zero1", "engine.expert_parallel=2")
    command += ("model.mlp=moe", "model.moe_scores=sigmoid", "model.moe_bias_speed=0.01")
    command += ("train.steps=8", "validation.every=8", "checkpoint.every=3", "train.compile=off")
    whole, cut = launching.whole_and_resumed(tmp_path, *command, step=5)
    assert len(whole) == 8
    assert cut == whole


def test_a_run_resumes_at_other_stages_and_world_sizes(dataset, tmp_path):
    base = ("run.name=moving", f"data.path={dataset}", *LENGTH)
    launching.train(tmp_path, "run.name=still", *base[1:], "launch.processes=1", "engine=zero1")
    run = tmp_path / "moving"
    places = [("launch.processes=2", "engine=zero3"), ("launch.processes=1", "engine=zero0")]
    for place, step in zip(places, (14, 28), strict=True):
        process = launching.start(tmp_path, *base, *place)
        launching.interrupt(process, run, step, signal.SIGINT)
    launching.train(tmp_path, *base, "launch.processes=4", "engine=zero2")
    moving, still = launching.rows(run), launching.rows(tmp_path / "still")
    for key in ("step", "g0", "g1", "tokens", "tokens_hash"):
        assert [row[key] for row in moving] == [row[key] for row in still]
    assert moving[-1]["loss"] == pytest.approx(still[-1]["loss"], rel=0.02)
    assert "numerics_changed" in launching.events(run)


def test_a_decay_branches_off_a_run(dataset, tmp_path):
    """run.from: the branch keeps g, and repeats the trunk until its own decay begins."""
    trunk = ("run.name=trunk", f"data.path={dataset}", *LENGTH, "schedule=constant")
    trunk += ("schedule.decay=null",)
    launching.train(tmp_path, *trunk, "checkpoint.keep=5")
    branch = ("run.name=branch", f"data.path={dataset}", *LENGTH, "train.steps=40")
    branch += ("schedule=wsd", "schedule.warmup=2", "schedule.decay=15", "run.from.run=trunk")
    launching.train(tmp_path, *branch, "run.from.step=20", "validation.every=40")
    rows = launching.rows(tmp_path / "branch")
    assert [row["step"] for row in rows] == list(range(21, 41))
    before = launching.trajectory(tmp_path / "trunk")[20:25]
    assert launching.trajectory(tmp_path / "branch")[:5] == before
    assert rows[-1]["learning_rate"]["muon"] < rows[0]["learning_rate"]["muon"] / 10
