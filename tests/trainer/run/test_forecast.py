"""A run and the card that foretold it: which card counts, when a band is due, what is said."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from forescale.checkpoint.writer import Position
from forescale.config.compose import compose
from forescale.config.duration import Duration
from forescale.config.frozen import freeze, may_resume, thaw
from forescale.config.schema import TargetConfig
from forescale.config.train import TrainJob
from forescale.engine.step import Facts
from forescale.errors import UserError
from forescale.models.config import ModelConfig
from forescale.models.flops import count
from forescale.plan.config import PlanJob
from forescale.run.directory import Run, read_rows
from forescale.run.forecast import GENESIS, band_of, find, hash_of, told
from forescale.slurm.config import SubmitJob
from forescale.train.callbacks import Every
from forescale.train.evaluate import Score
from forescale.train.loop import Step
from forescale.train.metrics import Line, Metrics, Prices
from tests import launching

MODEL = ModelConfig(
    num_layers=1, width=32, num_heads=2, mlp="relu2", vocab_size=300, max_sequence_length=32
).resolved()
N, STEPS, D = count(MODEL).blocks_and_head, 40, 40 * 4 * 32
NARROW = {"loss": 2.0, "interval_50": [1.98, 2.02], "interval": [1.9, 2.1]}


def job(card=None, **train):
    made = TrainJob(model=MODEL, forecast=None if card is None else str(card))
    made.schedule.kind, made.schedule.decay = "wsd", Duration(20, "percent")
    sizes = {"steps": STEPS, "sequence_length": 32, "global_batch": 4, "micro_batch": 4}
    return replace(made, train=replace(made.train, **sizes | train))


def write(folder, *more):
    """A chain of cards, each the usual facts with some changed; the path of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    before = GENESIS
    for number, changed in enumerate(more or ({},), 1):
        target = {"run": "big", "parameters": N, "tokens": D}
        facts = {"target": target, **NARROW, "level": 0.9, "before": before}
        facts |= {"convention": "N blocks_and_head, C causal", **changed}
        before = facts["hash"] = hash_of(facts)
        path = folder / f"{number:04d}.json"
        path.write_text(json.dumps(facts))
    return path


def at(n, d=D):
    return {"target": {"run": "big", "parameters": n, "tokens": d}}


def test_a_card_is_found_by_its_path_or_by_study_and_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(Path("studies/tiny/forecasts"), {}, {"loss": 2.05}, {})
    for name in (path, "tiny/3", "tiny/0003", tmp_path / path):
        assert find(str(name)).facts == json.loads(path.read_text())
    assert band_of(job("tiny/2")).loss == 2.05
    assert band_of(job()) is None


@pytest.mark.parametrize("name", ["tiny/4", "tiny/0001.outcome", "other/1", "studies/tiny", "7"])
def test_a_card_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(Path("studies/tiny/forecasts"))
    Path("studies/tiny/forecasts/0001.outcome.json").write_text("{}")
    with pytest.raises(UserError, match=r"^forecast: .*\b(no card).* or STUDY/ID, such as tiny/3"):
        find(name)
    with pytest.raises(UserError, match="is no card"):
        find("studies/tiny/forecasts/0001.outcome.json")


@pytest.mark.parametrize("harm", ["changed", "anew", "later", "removed", "list"])
def test_a_card_whose_chain_is_broken_measures_nothing(tmp_path, harm):
    path = write(tmp_path, {}, {}, {}).with_name("0002.json")
    facts = {**json.loads(path.read_text()), "loss": 1.0}
    if harm == "changed":
        path.write_text(json.dumps(facts))
    elif harm == "anew":  # with its own hash: the next card tells
        path.write_text(json.dumps(facts | {"hash": hash_of(facts)}))
    elif harm == "later":
        path.with_name("0003.json").write_text('{"hash": 1}')
    elif harm == "removed":
        path.with_name("0001.json").unlink()
    else:
        path.write_text("[]")
    with pytest.raises(UserError, match=r"was changed after it was written|0001 is missing"):
        band_of(job(path))


def test_a_run_of_another_n_or_d_is_refused_with_both_numbers(tmp_path):
    path = write(tmp_path, at(1.02 * N))
    with pytest.raises(UserError, match=rf"N = {1.02 * N:,.0f}, .* {N:,} \(blocks_and_head\)"):
        band_of(job(path))
    path = write(tmp_path)
    with pytest.raises(UserError, match=rf"D = {D:,} tokens, .* after {D // 40 * 41:,}"):
        band_of(job(path, steps=41))
    near = write(tmp_path, at(1.005 * N, 0.995 * D))
    assert band_of(job(near)).tokens == 0.995 * D
    with pytest.raises(UserError, match="a class of your own, of unknown size"):
        band_of(replace(job(path), model=TargetConfig("mine.Model")))


def test_n_is_counted_as_the_card_counts(tmp_path):
    total = count(MODEL).total
    assert total > 1.02 * N
    with pytest.raises(UserError, match=r"this run's model has [\d,]+ \(blocks_and_head\);"):
        band_of(job(write(tmp_path, at(total))))
    theirs = {"convention": "N as the table counts, C as the table counts"}
    for said in ({"convention": "N total, C causal"}, theirs):
        assert band_of(job(write(tmp_path, at(total) | said)))
    with pytest.raises(UserError, match=rf"{N:,} \(blocks_and_head\), .*, {total:,} \(total\);"):
        band_of(job(write(tmp_path, at(3 * N) | theirs)))


@pytest.mark.parametrize("lost", [{"interval": None}, {"loss": math.nan}, at(math.nan, math.nan)])
def test_a_card_without_a_band_is_refused(tmp_path, lost):
    """A law of FLOPs alone makes such cards: they know no N and no D."""
    with pytest.raises(UserError, match="foretells no loss with its intervals at an N and a D"):
        band_of(job(write(tmp_path, lost)))


def test_a_branch_is_measured_by_the_band_of_its_own_end(tmp_path):
    points = [{"tokens": D, **NARROW}, {"tokens": D / 2, **NARROW, "loss": 2.09}]
    path = write(tmp_path, {"bands": points})
    assert band_of(job(path)).loss == 2.0
    assert band_of(job(path, steps=STEPS // 2)).loss == 2.09
    with pytest.raises(UserError, match=rf"D = {D:,} and {D // 2:,} tokens"):
        band_of(job(path, steps=STEPS // 4))


def test_what_is_said_before(tmp_path):
    path = write(tmp_path, {})
    made = job(path)
    said = "Forecast 0001: loss 2.0000 (90 % 1.9000 to 2.1000) due at step 40"
    assert band_of(made).due(made) == said + "."
    flat = replace(made, schedule=replace(made.schedule, kind="constant", decay=None))
    assert band_of(flat).due(flat).startswith(said + ", but the run never decays")


def test_a_judgement_and_its_sentence(tmp_path):
    band = band_of(job(write(tmp_path)))
    facts = band.judge(2.05)
    assert facts["log_error"] == pytest.approx(math.log(2.0 / 2.05)), "as a score has it"
    assert (facts["inside_50"], facts["inside_90"]) == (False, True)
    assert facts["hash"] == json.loads(band.card.read_text())["hash"]
    said = "Forecast 0001: loss 2.0500, +2.50 % of the forecast 2.0000, inside its 90 % interval"
    assert told(facts) == said + ", 1.9000 to 2.1000."
    assert "-10.00 % of the forecast 2.0000, outside its 90 %" in told(band.judge(1.8))
    assert "inside_80" in replace(band, level=0.8).judge(2.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0])
def test_a_loss_that_is_no_number_is_outside(tmp_path, loss):
    facts = band_of(job(write(tmp_path))).judge(loss)
    assert facts["inside_90"] is False
    attempt = Run(tmp_path).new_attempt()
    attempt.event("forecast", **facts)
    (row,) = read_rows(attempt.events.path)
    assert "outside its 90 % interval" in told(row)


@pytest.fixture
def metrics(tmp_path):
    """Of a run that is measured by a card; is_main: of rank 0."""

    def make(is_main=True):
        line = Line(Every(Duration(10), 10, STEPS), STEPS, 0, is_main)
        prices = Prices(full=6.0, causal=5.0, six_n=4.0, peak=1.0)
        attempt, band = Run(tmp_path / "run").new_attempt(), band_of(job(write(tmp_path / "f")))
        return Metrics(attempt, prices, {}, line, [], lambda: 1, is_main, band=band)

    return make


def score(made, step, loss, windows=3):
    position = Position(step, 4 * step, D // STEPS * step)
    last = Step(position, 0, {}, 1.0, Facts(torch.zeros(1), 1.0, True), {})
    source = Score(9.9, 0.1, 2.0, 10, 20, windows)
    made.validated(last, {"web": source, "validation": replace(source, loss=loss)})
    return [row for row in read_rows(made.attempt.events.path) if "forecast" in row["kind"]]


def test_no_band_is_due_before_the_end(metrics, capsys):
    made = metrics()
    assert score(made, STEPS - 1, 7.0) == []
    assert "orecast" not in capsys.readouterr().out


def test_the_end_is_measured_by_all_sources_together(metrics, capsys):
    (row,) = score(metrics(), STEPS, 2.01)
    assert (row["kind"], row["step"], row["tokens"]) == ("forecast", STEPS, D)
    assert (row["foretold"], row["observed"]) == (2.0, 2.01)
    assert (row["inside_50"], row["inside_90"]) == (True, True)
    out = capsys.readouterr().out
    assert out.count("Forecast 0001: loss 2.0100, +0.50 % of the forecast 2.0000, inside") == 1
    assert "Warning" not in out


def test_an_end_outside_is_an_event_of_its_own(metrics, capsys):
    rows = score(metrics(), STEPS, 2.2)
    assert [row["kind"] for row in rows] == ["forecast", "left_forecast"]
    assert rows[1]["inside_90"] is False
    out = capsys.readouterr().out
    assert "outside its 90 % interval, 1.9000 to 2.1000.\nWarning: the run left the fore" in out


def test_other_ranks_and_ends_without_held_out_text_measure_nothing(metrics, capsys):
    assert score(metrics(is_main=False), STEPS, 2.2) == []
    assert capsys.readouterr().out == ""
    assert score(metrics(), STEPS, math.nan, windows=0) == []


def test_every_verb_takes_the_key_and_a_run_may_change_it():
    plan = compose(PlanJob, ["forecast=tiny/3"])
    submit = compose(SubmitJob, ["forecast=tiny/3", "machine=cpu"])
    assert plan.forecast == submit.training.forecast == "tiny/3"
    old = job("tiny/3")
    assert thaw(TrainJob, freeze(old)).forecast == "tiny/3"
    refusals, numerics, (change,) = may_resume(old, replace(old, forecast=None), 39)
    assert (refusals, numerics, change.key) == ([], [], "forecast")


def test_a_bad_card_is_refused_before_anything_is_made(
    small_data, tmp_path, forescale, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ("train", f"data.path={small_data}", "schedule.warmup=0", "schedule.decay=2")
    code, _, err = forescale(*words, "forecast=tiny/1")
    assert code == 2
    assert err.startswith("forescale: forecast: there is no card studies/tiny/forecasts/0001.json")
    write(Path("studies/tiny/forecasts"))
    code, _, err = forescale(*words, "forecast=tiny/1")
    assert (code, f"is of N = {N:,}, and this run's model has" in err) == (2, True)
    assert not Path("runs").exists()


@pytest.fixture
def foretold_run(own_run):
    """A complete run of 8 steps and a loss of 3, whose config names a card of 2.9 to 3.1."""
    old = thaw(TrainJob, own_run.config)
    n, d = count(old.model).blocks_and_head, old.total_steps * old.tokens_per_step
    points = {"loss": 2.95, "interval_50": [2.94, 2.96], "interval": [2.9, 3.1]}
    path = write(Path("studies/tiny/forecasts"), at(n, d) | points)
    own_run.config.write_text(freeze(replace(old, forecast="tiny/1")))
    return SimpleNamespace(run=own_run, card=path, job=replace(old, forecast="tiny/1"))


def test_status_says_how_it_came_out(foretold_run, forescale):
    said = "Forecast 0001: loss 3.0000, +1.69 % of the forecast 2.9500, inside its 90 % interval"
    assert said in forescale("status", "small")[1], "from the last score: the card came later"
    facts = {"step": 8, **band_of(foretold_run.job).judge(3.0)}
    foretold_run.run.attempts()[-1].event("forecast", **facts)
    foretold_run.card.unlink()
    assert said in forescale("status", "small")[1], "from the event: the card is gone"


def test_status_says_what_is_due(foretold_run, forescale):
    *rows, scored = foretold_run.run.metrics.read_text().splitlines(keepends=True)
    midway = scored.replace('"step": 8', '"step": 4')
    foretold_run.run.metrics.write_text("".join([*rows[:4], midway]))
    said = "Forecast 0001: loss 2.9500 (90 % 2.9000 to 3.1000) due at step 8."
    assert said in forescale("status", "small")[1]
    foretold_run.card.write_text("{}")
    code, out, _ = forescale("status", "small")
    assert code == 0
    assert "The forecast can't be read: studies/tiny/forecasts/0001.json: was changed" in out


@pytest.mark.distributed
def test_two_ranks_measure_their_end(dataset, tmp_path):
    words = (f"data.path={dataset}", "train.tokens=null", "train.steps=12", "launch.processes=2")
    output = launching.train(tmp_path, "run.name=first", *words)
    assert "orecast" not in output
    made = thaw(TrainJob, tmp_path / "first" / "config.yaml")
    n, d = count(made.model).blocks_and_head, made.total_steps * made.tokens_per_step
    write(tmp_path / "studies/tiny/forecasts", at(n, d))  # a loss of 2: far below
    output = launching.train(tmp_path, "run.name=second", *words, "forecast=tiny/1")
    assert output.count("Forecast 0001: loss 2.0000 (90 % 1.9000 to 2.1000) due at step 12.") == 1
    assert output.count("Warning: the run left the forecast of studies/tiny/forecasts/0001") == 1
    kinds = launching.events(tmp_path / "second")
    assert [kind for kind in kinds if "forecast" in kind] == ["forecast", "left_forecast"]
    assert launching.trajectory(tmp_path / "second") == launching.trajectory(tmp_path / "first")
