"""`forescale try` from its question to its answer, with simulated runs."""

import json
from pathlib import Path

import pytest

from forescale.ground.errors import INTERRUPTED
from forescale.trials import campaign as module
from forescale.trials import running, trial
from forescale.trials.fairness import Outcome
from forescale.trials.ledger import Ledger
from tests.trainer.scaling.fake_training import train
from tests.trainer.trials.conftest import BASE, Simulated

GELU = ("--", "model.mlp=gelu")


def rows(kind):
    return Ledger(Path("campaigns/first/log.jsonl")).of(kind)


def test_a_better_change_is_confirmed_by_fresh_seeds_and_worth_a_factor(tried_with_runs):
    Simulated.gains = {"gelu": 0.03}
    code, out, _ = tried_with_runs("gelu", BASE, *GELU)
    assert code == 0
    assert "gelu: better (confirmed by fresh seeds)." in out
    assert "base-s1 took " in out
    assert "; at most 23 more runs, " in out, "of 12 pairs"
    assert "Noise of seeds: 0." in out
    assert "Factor of compute" in out
    first, fresh = (
        [row for row in rows("pair") if row["stage"] == stage] for stage in ("first", "fresh")
    )
    assert [row["seed"] for row in first] == list(range(1, len(first) + 1))
    assert {"gelu-s1001", "base-s1001"} <= set(Simulated.names)
    assert len(fresh) >= 2
    page = Path("campaigns/first/report.html").read_text()
    assert "confirmed by fresh seeds" in page
    assert Ledger(Path("campaigns/first/log.jsonl")).head in page


def test_a_null_change_is_no_better_and_a_small_one_not_yet_known_until_it_has_more_pairs(
    tried, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = tried("gelu", BASE, "gain=0.02", *GELU)
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith("gelu  "))
    assert "no better" in line, "a narrow terminal has room for the answer"
    assert line.count("%") == 3, "and for the gain, with its interval"
    assert "Factor of time: 1 (90%: 1 to 1)." in out, "what no better change costs, too"
    assert "gelu: no better (a gain of 2.00% or more is ruled out)." in out
    assert "base-half-s1" not in Simulated.names, "only a better change needs its factor"

    Simulated.gains = {"relu": 0.008}
    assert "is found in at least " in out, "two runs of one seed may share noise"
    _, out, _ = tried("relu", "pairs=3", "--", "model.mlp=relu2")
    assert "is found in at least " not in out, "the first trial's pairs show how they differ"
    assert "relu: not yet known (more pairs can tell)." in out
    before = len(rows("pair"))
    _, out, _ = tried("relu", "pairs=40")
    assert "relu: better" in out
    assert len(rows("pair")) > before
    assert [row["number"] for row in rows("attempt")] == [1, 2]
    assert rows("attempt")[1]["threshold"] == pytest.approx(6 / 0.05)
    assert Simulated.names.count("base-s1") == 1, "runs of the base are shared"


def test_a_larger_size_is_predicted_before_its_first_run(tried):
    Simulated.gains = {"gelu": 0.03}
    larger = "larger=[model.width=48,train.tokens=2000]"
    _, out, _ = tried("gelu", BASE, larger, *GELU)
    assert "better at the larger size too" in out
    kinds = [row["kind"] for row in Ledger(Path("campaigns/first/log.jsonl")).rows]
    names = [row.get("name", "") for row in Ledger(Path("campaigns/first/log.jsonl")).rows]
    ran = [i for i, name in enumerate(names) if "larger" in name]
    assert kinds.index("prediction") < ran[0]


def test_what_would_fool_it_is_refused_by_name(tried, monkeypatch):
    Simulated.gains = {"gelu": 0.03}
    tried("gelu", BASE, "pairs=2", *GELU)
    for words, part in (
        (("again", *GELU), "is the change of gelu"),
        (("gelu", "--", "model.mlp=relu2"), "is the trial of [model.mlp=gelu]"),
        (("other", "base=[data=bytes,train.steps=99]", "--", "model.mlp=relu2"), "base="),
        (("longer", "--", "train.tokens=9999"), "train.tokens"),
        (("easy", "--", "data.path=/tmp"), "data.path"),
        (("base-x", "--", "model.mlp=relu2"), "is no name"),
        (("base", "--", "model.mlp=relu2"), "is no name"),
        (("new-larger", "--", "model.mlp=relu2"), "is no name"),
        (("gelu", "gain=0.3"), "gain: is 0.01"),
        (("gelu", "alpha=0.3"), "alpha: is 0.05"),
        (("new",), "needs a change"),
        (("new", "model.mlp=relu2"), "-- model.mlp=relu2"),
        (("new", "campaign=../x", "--", "model.mlp=relu2"), "is no name"),
    ):
        code, _, err = tried(*words)
        assert code == 2, words
        assert part in err
        assert err.count("\n") == 1
    assert len(rows("attempt")) == 1, "what is refused before it begins is no attempt"

    monkeypatch.setattr(module, "code_hash", lambda: "another")
    code, _, err = tried("relu", "--", "model.mlp=relu2")
    assert code == 2
    assert "the code of forescale has changed" in err

    log = Path("campaigns/first/log.jsonl")
    log.write_text(log.read_text().replace('"threshold": 40', '"threshold": 4', 1))
    code, _, err = tried()
    assert code == 2
    assert "restore" in err


def test_a_run_that_was_deleted_changes_no_pair_and_is_not_drawn_again(tried):
    tried("gelu", BASE, "pairs=2", "gain=0.0001", *GELU)
    pairs = rows("pair")
    del Simulated.losses["gelu-s2"]
    tried("gelu", "pairs=3")
    assert rows("pair")[:2] == pairs
    assert Simulated.names[-2:] == ["base-s3", "gelu-s3"]


def test_a_run_put_there_by_hand_and_a_log_cut_at_its_end_are_refused(tried_with_runs):
    tried_with_runs("gelu", BASE, "pairs=2", "gain=0.0001", *GELU)
    words = [
        *BASE[len("base=[") : -1].split(","),
        "model.mlp=gelu",
        "run.root=campaigns/first/runs",
    ]
    train([*words, "train.steps=400", "train.seed=3", "run.name=gelu-s3"], 2.0)
    code, _, err = tried_with_runs("gelu", "pairs=3")
    assert code == 2
    assert "gelu-s3: isn't the run of this trial: train.steps is 400" in err
    assert len(rows("pair")) == 2
    log = Path("campaigns/first/log.jsonl")
    lines = log.read_text().splitlines()
    log.write_text(lines[0] + "\n")
    code, _, err = tried_with_runs("again", *GELU)
    assert code == 2
    assert "has no trial gelu, but there is campaigns/first/runs/gelu-s1" in err


def test_a_run_without_a_score_stops_the_trial(tried, monkeypatch):
    """And doesn't start again for ever."""
    monkeypatch.setattr(trial, "outcome", lambda run, uniform: Outcome("open", uniform, {}))
    code, _, err = tried("gelu", BASE, *GELU)
    assert code == 2
    assert "base-s1: ended without a held-out loss of its last step" in err
    assert Simulated.names == ["base-s1"]


def test_a_budget_is_hard_and_what_failed_counts(tried):
    _, out, _ = tried("gelu", BASE, "budget.runs=5", "gain=0.0001", *GELU)
    assert len(Simulated.names) == 5
    assert "Stopping: budget.runs=5 is spent" in out
    assert "not yet known" in out
    _, out, _ = tried("relu", "--", "model.mlp=relu2")
    assert "Stopping: budget.runs=5 is spent" in out, "it holds for later commands too"
    assert len(Simulated.names) == 5
    campaign = module.Campaign(Path("campaigns/first"))
    spent, row = campaign.spent(), campaign.ledger.of("ran")[0]
    campaign.ledger.add("ran", **{k: row[k] for k in ("attempt", "name", "flops", "seconds")})
    assert campaign.spent() == spent, "a run that was resumed is one run"
    Simulated.codes = {"relu-s1": 2}
    code, _, err = tried("relu", "budget.runs=99")
    assert code == 2
    assert "relu-s1: optimizer: is refused" in err
    assert len(rows("attempt")) == 2
    assert rows("stopped")[-1]["attempt"] == 2
    code, out, _ = tried()
    assert code == 0
    assert "stopped" in out


def test_runs_under_way_stop_when_the_seconds_are_spent(tried, monkeypatch):
    """They save and end, and a larger budget lets them go on."""
    stopped = list[str]()

    def poll(self):
        return self._code if self._code or not is_slow else None

    def send_signal(self, number):
        stopped.append(self.names[-1])
        self._code = INTERRUPTED

    is_slow = True
    monkeypatch.setattr(Simulated, "poll", poll)
    monkeypatch.setattr(Simulated, "send_signal", send_signal)
    monkeypatch.setattr(running, "_LOOK", 0.0)
    monkeypatch.setattr(running, "_spent", lambda run: (1e6, 50.0))
    code, out, _ = tried("gelu", BASE, "budget.seconds=49", *GELU)
    assert code == 0
    assert "budget.seconds=49 is spent; with the runs under way it is 50;" in out
    assert (len(stopped), len(rows("stopped")), len(rows("pair"))) == (1, 1, 0)
    is_slow = False
    _, out, _ = tried("gelu", "budget.seconds=1e9")
    assert "gelu: no better" in out


def test_the_base_of_a_campaign_is_what_it_was(tried, tmp_path, monkeypatch):
    """Also where its words name a config file, which anybody may edit."""
    choice = tmp_path / "conf" / "experiment" / "mine.yaml"
    choice.parent.mkdir(parents=True)
    text = "# @package _global_\noptimizer:\n  learning_rate: {}\n"
    monkeypatch.setenv("FORESCALE_CONF", str(tmp_path / "conf"))
    choice.write_text(text.format(0.01))
    base = BASE.replace("]", ",experiment=mine]")
    assert tried("gelu", base, *GELU)[0] == 0
    choice.write_text(text.format(0.02))
    code, _, err = tried("relu", "--", "model.mlp=relu2")
    assert code == 2
    assert "optimizer.learning_rate: is 0.02 in the base today, and was 0.01" in err
    assert len(rows("attempt")) == 1
    code, _, err = tried("gelu", "campaign=frist", *GELU)
    assert code == 2
    assert "there is no campaign frist in campaigns, but first" in err
    assert not Path("campaigns/frist").exists()


def test_a_diverged_run_counts_as_a_uniform_guess(tried):
    Simulated.losses = {}
    Simulated.gains = {"gelu": -1.0}  # beyond a uniform guess
    _, out, _ = tried("gelu", BASE, *GELU)
    assert "gelu: no better" in out
    assert {row["change"]["state"] for row in rows("pair")} == {"diverged"}


def test_the_answer_for_programs(tried):
    Simulated.gains = {"gelu": 0.03}
    code, out, _ = tried("gelu", BASE, "--json", *GELU)
    assert code == 0
    facts = json.loads(out)
    (trial,) = facts["trials"]
    assert trial["answer"] == "better"
    assert trial["interval"][0] > 0
    assert trial["factors"]["compute"]["value"] > 1
    assert facts["log"] == Ledger(Path("campaigns/first/log.jsonl")).head
    code, out, err = tried("--json", "campaign=none")
    assert code == 2
    assert "holds no campaign" in err or "holds no campaign" in out
