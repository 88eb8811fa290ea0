"""A plan of mixtures: which shares the runs have, and what is refused."""

import numpy as np
import pytest

from forescale import cli
from forescale.scaling.design.mixtures import mixtures

PLAN = ["plan.kind=mixtures", "plan.cap=3e12", "plan.points=10", "plan.sequence_length=64"]


def shared(data):
    sources = ", ".join(f"{name}: {data}" for name in ("a", "b", "c"))
    return ["--", "data=mixture", f"data.sources={{{sources}}}", "optimizer=adamw"]


def test_mixtures_begin_with_the_current_one_and_leave_no_large_gap():
    shares = mixtures([0.7, 0.2, 0.1], 16, 0.05, 3)
    assert shares[0] == pytest.approx([0.7, 0.2, 0.1])
    assert shares[1] == pytest.approx([1 / 3] * 3)
    assert shares[2:5].max(axis=0) == pytest.approx([0.9] * 3)
    assert shares.sum(axis=1) == pytest.approx(np.ones(16))
    assert shares.min() >= 0.05 - 1e-9
    assert (mixtures([0.7, 0.2, 0.1], 16, 0.05, 3) == shares).all()
    anywhere = 0.05 + 0.85 * np.random.default_rng(0).dirichlet(np.ones(3), 500)
    gaps = np.sqrt(np.square(anywhere[:, None] - shares).sum(-1)).min(axis=1)
    assert gaps.max() < 0.2
    apart = np.sqrt(np.square(shares[:, None] - shares).sum(-1)) + np.eye(16)
    assert apart.min() > 0.06


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan.points=7"], "7 mixtures of 3 sources determine no law"),
        (["plan.least=0.34"], "leaves nothing to vary"),
        (["goal={web: 1}"], "'web' is no source"),
        (["plan.cap=1e6"], "no run can be as small"),
        (["target.flops=1e20"], "is predicted by a law of one mixture"),
    ],
)
def test_a_plan_that_tells_nothing_is_refused(arguments, message, small_data, tmp_path, capsys):
    words = ["study", "plan", f"studies={tmp_path}", *PLAN, *arguments, *shared(small_data)]
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_one_dataset_is_no_mixture(small_data, tmp_path, capsys):
    one = ["--", f"data.path={small_data}", "optimizer=adamw"]
    assert cli.main(["study", "plan", f"studies={tmp_path}", *PLAN, *one]) == 2
    assert "has 0 sources to mix" in capsys.readouterr().err
