"""A study of mixtures from its plan to its check, with a fake training: the best shares of three
sources are known."""

import json

import numpy as np
import pytest

from forescale import cli
from forescale.scaling.design.plan import dump, load
from forescale.scaling.study.directory import Study
from forescale.scaling.study.launching import summary
from tests.trainer.scaling import fake_training as fakes

pytestmark = pytest.mark.slow  # plans a whole study, and makes 20 runs

PLAN = [
    *("plan.kind=mixtures", "plan.cap=3e12", "plan.points=10", "plan.seeds=[3,2]"),
    *("plan.sequence_length=64", "plan.ratio=5", "bootstraps=100", "goal={a: 2, b: 1}"),
]
SOURCES = ("a", "b", "c")
# Of log L = q - g log r_own, the goal with weights 2 and 1 needs nothing of c.
POWER = {"a": 0.10, "b": 0.05, "c": 0.02}


def losses_of(row) -> dict[str, float]:
    rng = np.random.default_rng([row["seed"], int(1e4 * row["share_a"]), int(row["tokens"])])
    level = 3 * (row["tokens"] / 1e5) ** -0.1
    return {
        n: level * row[f"share_{n}"] ** -POWER[n] * np.exp(5e-4 * rng.standard_normal())
        for n in SOURCES
    }


def shared(data, *words):
    sources = ", ".join(f"{name}: {data}" for name in SOURCES)
    return ["--", "data=mixture", f"data.sources={{{sources}}}", "optimizer=adamw",
            "validation.every=100 %", *words]  # fmt: skip


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory, fake_training):
    """The study, launched to its end."""
    root = tmp_path_factory.mktemp("mixtures")
    where = [f"studies={root}", "study=whole"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes, "source_losses", losses_of)
        current = shared(small_data, "data.weights={a: 1, b: 1, c: 2}")
        assert cli.main(["study", "plan", *where, *PLAN, *current]) == 0
        assert cli.main(["study", "launch", *where, "launch.at_once=2"]) == 0
    return Study(root / "whole")


def test_launch_prints_the_goal_of_a_run(whole):
    row = whole.table().iloc[0]
    line = summary(whole, whole.state(whole.plan.cells[0]))
    assert f"goal {(2 * row['loss_a'] + row['loss_b']) / 3:.4f}, loss {row['loss']:.4f} in" in line


def command(study, action, *words):
    return cli.main(["study", action, f"studies={study.folder.parent}", "study=whole", *words])


def test_the_plan_has_each_mixture_once_a_sweep_and_repeats_of_the_current_one(whole):
    cells = whole.plan.stage(1).cells
    current = dict(cells[0].weights)
    assert current == {"a": 0.25, "b": 0.25, "c": 0.5}
    assert len({c.weights for c in cells if c.role == "grid"}) == 10
    assert [c.role for c in cells if dict(c.weights) == current].count("seed") == 2
    assert len({(c.tokens, c.shape.parameters) for c in cells}) == 1
    arguments = whole.arguments(cells[0])
    assert "data.weights={a: 0.25, b: 0.25, c: 0.5}" in arguments
    assert whole.spent <= whole.plan.cap
    assert load(json.loads(json.dumps(dump(whole.plan)))) == whole.plan


def test_larger_runs_check_the_best_mixture_against_the_current_one_with_equal_seeds(whole):
    checks = whole.plan.stage(2).cells
    assert [c.name for c in checks] == [
        "check-best-seed1", "check-best-seed2", "check-current-seed1", "check-current-seed2",
    ]  # fmt: skip
    assert [c.seed for c in checks[:2]] == [c.seed for c in checks[2:]]
    small = whole.plan.stage(1).cells[0]
    assert all(2.5 < c.cost / small.cost < 4 for c in checks)
    assert {s.status for s in whole.states()} == {"complete"}


def test_fit_gives_the_true_best_shares_ready_to_use(whole, capsys):
    assert command(whole, "fit", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["law"] == "power"
    assert facts["left_out_error"]["power"] < 0.2 * facts["left_out_error"]["mean"]
    # c has the lowest share of the runs; of the rest, 2 a^-.1 + b^-.05 is lowest at a = 0.752.
    assert facts["weights"]["c"] == pytest.approx(0.05, abs=3e-3)
    low, high = facts["interval"]["a"]
    assert low < 0.752 < high
    assert high - low < 0.15
    checked = facts["check"]
    assert checked["pairs"] == 2
    assert checked["ratio"]["value"] == pytest.approx(checked["predicted"]["value"], abs=3e-3)
    assert command(whole, "fit") == 0
    text = capsys.readouterr().out
    assert "data.weights='{a: 0." in text
    assert "The best share of c is the lowest one that a run has" in text
    assert command(whole, "fit", "goal={c: 1}", "--json") == 0
    assert json.loads(capsys.readouterr().out)["weights"]["c"] > 0.8, "another goal, other shares"


def test_the_page_has_a_picture_of_each_source_and_the_check(whole, capsys):
    assert command(whole, "report") == 0
    text = (whole.folder / "report.html").read_text()
    for source in SOURCES:
        assert f"share of {source}" in text
    assert "The best mixture is better there too." in text
    assert (whole.folder / "report-files" / "shares.png").stat().st_size > 10_000


def test_a_table_of_others_is_fitted_without_a_study(whole, tmp_path, capsys):
    rows = whole.table().query("role == 'grid'")
    columns = [c for c in rows if c.startswith(("share_", "loss_")) and "stderr" not in c]
    rows[["loss", *columns]].to_csv(tmp_path / "mixed.csv", index=False)
    assert cli.main(["study", "fit", str(tmp_path / "mixed.csv"), "goal={a: 2, b: 1}"]) == 0
    assert "data.weights='{a: 0." in capsys.readouterr().out
    assert cli.main(["study", "fit", str(tmp_path / "mixed.csv"), "goal={z: 1}"]) == 2
    assert "has no column loss_z" in capsys.readouterr().err
    for off, code in ((26, 0), (50_000, 2)):  # a shorter window at the end of a shard; another D
        tokens = [10**5 + off, *[10**5] * (len(rows) - 1)]
        rows[["loss", *columns]].assign(tokens=tokens).to_csv(tmp_path / "mixed.csv", index=False)
        assert cli.main(["study", "fit", str(tmp_path / "mixed.csv")]) == code


def test_the_loss_of_a_bigger_run_is_not_predicted_from_mixtures(whole, capsys):
    assert command(whole, "predict", "target.run=big", "target.flops=1e15") == 2
    assert "has several mixtures" in capsys.readouterr().err
