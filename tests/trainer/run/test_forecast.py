"""A run and its forecast: which forecast is accepted, when it is compared, what is printed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from forescale.checkpoint.reader import Position
from forescale.config.compose import compose
from forescale.config.frozen import freeze, may_resume, thaw
from forescale.config.schema import TargetConfig
from forescale.config.sections.batch import Cadence
from forescale.config.sections.schedule import ConstantConfig, WsdConfig
from forescale.config.train import TrainJob
from forescale.engine.step import Facts
from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig
from forescale.models.flops import count
from forescale.plan.config import PlanJob
from forescale.run.directory import Run
from forescale.run.forecast import GENESIS, describe, find, hash_of, prediction_interval_of
from forescale.run.rows import read_rows
from forescale.slurm.config import SubmitJob
from forescale.train.callbacks import Every, Step
from forescale.train.evaluate import Score
from forescale.train.metrics import Metrics, Prices, ProgressLine
from tests import launching
from tests.trainer.small_run import change_rows

MODEL = ModelConfig(
    num_layers=1, width=32, num_heads=2, mlp="relu2", vocab_size=300, max_sequence_length=32
).resolved()
N, STEPS, D = count(MODEL).blocks_and_head, 40, 40 * 4 * 32
NARROW = {"loss": 2.0, "interval_50": [1.98, 2.02], "interval": [1.9, 2.1]}


def job(forecast=None, **train):
    new = TrainJob(model=MODEL, forecast=None if forecast is None else str(forecast))
    new.schedule = WsdConfig()
    sizes = {"steps": STEPS, "sequence_length": 32, "global_batch": 4, "micro_batch": 4}
    return replace(new, train=replace(new.train, **sizes | train))


def write(folder, *fields):
    """Write a chain of forecasts, each with some facts changed; return the path of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    previous = GENESIS
    for number, changed in enumerate(fields or ({},), 1):
        target = {"run": "big", "parameters": N, "tokens": D}
        facts = {"target": target, **NARROW, "level": 0.9, "previous_hash": previous}
        facts |= {"convention": "N blocks_and_head, C causal", **changed}
        previous = facts["hash"] = hash_of(facts)
        path = folder / f"{number:04d}.json"
        path.write_text(json.dumps(facts))
    return path


def at(n, d=D):
    return {"target": {"run": "big", "parameters": n, "tokens": d}}


def test_a_forecast_is_found_by_path_or_by_study_and_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(Path("studies/tiny/forecasts"), {}, {"loss": 2.05}, {})
    for name in (path, "tiny/3", "tiny/0003", tmp_path / path):
        assert find(str(name)).facts == json.loads(path.read_text())
    assert prediction_interval_of(job("tiny/2")).loss == 2.05
    assert prediction_interval_of(job()) is None


@pytest.mark.parametrize("name", ["tiny/4", "tiny/0001.outcome", "other/1", "studies/tiny", "7"])
def test_a_missing_forecast_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(Path("studies/tiny/forecasts"))
    Path("studies/tiny/forecasts/0001.outcome.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"^forecast: .*\b(no forecast).* or STUDY/ID, such as tiny/3"
    ):
        find(name)
    with pytest.raises(UserError, match="is no forecast"):
        find("studies/tiny/forecasts/0001.outcome.json")


@pytest.mark.parametrize("harm", ["changed", "anew", "later", "removed", "list"])
def test_a_forecast_with_a_broken_chain_is_refused(tmp_path, harm):
    path = write(tmp_path, {}, {}, {}).with_name("0002.json")
    facts = {**json.loads(path.read_text()), "loss": 1.0}
    if harm == "changed":
        path.write_text(json.dumps(facts))
    elif harm == "anew":  # with its own hash: the next forecast holds the old one
        path.write_text(json.dumps(facts | {"hash": hash_of(facts)}))
    elif harm == "later":
        path.with_name("0003.json").write_text('{"hash": 1}')
    elif harm == "removed":
        path.with_name("0001.json").unlink()
    else:
        path.write_text("[]")
    with pytest.raises(UserError, match=r"was changed after it was written|0001 is missing"):
        prediction_interval_of(job(path))


def test_a_forecast_for_another_n_or_d_is_refused_with_both_numbers(tmp_path):
    path = write(tmp_path, at(1.02 * N))
    with pytest.raises(UserError, match=rf"N = {1.02 * N:,.0f}, .* {N:,} \(blocks_and_head\)"):
        prediction_interval_of(job(path))
    path = write(tmp_path)
    with pytest.raises(UserError, match=rf"D = {D:,} tokens, .* after {D // 40 * 41:,}"):
        prediction_interval_of(job(path, steps=41))
    near = write(tmp_path, at(1.005 * N, 0.995 * D))
    assert prediction_interval_of(job(near)).tokens == 0.995 * D
    with pytest.raises(UserError, match="of such a model class is unknown"):
        prediction_interval_of(replace(job(path), model=TargetConfig("mine.Model")))


def test_n_is_counted_by_the_convention_of_the_forecast(tmp_path):
    total = count(MODEL).total
    assert total > 1.02 * N
    with pytest.raises(UserError, match=r"this run's model has [\d,]+ \(blocks_and_head\);"):
        prediction_interval_of(job(write(tmp_path, at(total))))
    table = {"convention": "N as the table counts, C as the table counts"}
    for convention in ({"convention": "N total, C causal"}, table):
        assert prediction_interval_of(job(write(tmp_path, at(total) | convention)))
    with pytest.raises(UserError, match=rf"{N:,} \(blocks_and_head\), .*, {total:,} \(total\);"):
        prediction_interval_of(job(write(tmp_path, at(3 * N) | table)))


@pytest.mark.parametrize("lost", [{"interval": None}, {"loss": math.nan}, at(math.nan, math.nan)])
def test_a_forecast_without_a_prediction_interval_is_refused(tmp_path, lost):
    """A law of FLOPs alone makes forecasts without N and D."""
    with pytest.raises(UserError, match=r"predicts no loss with intervals|is damaged: "):
        prediction_interval_of(job(write(tmp_path, lost)))


def test_a_branch_is_compared_with_the_prediction_for_its_own_length(tmp_path):
    points = [{"tokens": D, **NARROW}, {"tokens": D / 2, **NARROW, "loss": 2.09}]
    path = write(tmp_path, {"points": points})
    assert prediction_interval_of(job(path)).loss == 2.0
    assert prediction_interval_of(job(path, steps=STEPS // 2)).loss == 2.09
    with pytest.raises(UserError, match=rf"D = {D:,} and {D // 2:,} tokens"):
        prediction_interval_of(job(path, steps=STEPS // 4))


def test_the_message_before_the_run(tmp_path):
    path = write(tmp_path, {})
    new = job(path)
    text = "Forecast 0001: loss 2.0000 expected at step 40 (90 % interval 1.9000 to 2.1000)"
    assert prediction_interval_of(new).due_message(new) == text + "."
    flat = replace(new, schedule=ConstantConfig())
    assert f"{text}; the learning rate" in prediction_interval_of(flat).due_message(flat)


def test_a_comparison_and_its_sentence(tmp_path):
    predicted = prediction_interval_of(job(write(tmp_path)))
    facts = predicted.compare(2.05)
    assert facts["log_error"] == pytest.approx(math.log(2.0 / 2.05)), "as in a score"
    assert (facts["inside_50"], facts["inside_90"]) == (False, True)
    assert facts["hash"] == json.loads(predicted.forecast.read_text())["hash"]
    text = "Forecast 0001: observed loss 2.0500, +2.50 % from the predicted 2.0000, inside the 90 %"
    assert describe(facts) == text + " interval 1.9000 to 2.1000."
    outside = describe(predicted.compare(1.8))
    assert "-10.00 % from the predicted 2.0000, outside the 90 %" in outside
    assert "inside_80" in replace(predicted, level=0.8).compare(2.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0])
def test_a_loss_that_is_not_finite_or_zero_is_outside(tmp_path, loss):
    facts = prediction_interval_of(job(write(tmp_path))).compare(loss)
    assert facts["inside_90"] is False
    attempt = Run(tmp_path).new_attempt()
    attempt.event("forecast_scored", **facts)
    (row,) = read_rows(attempt.events.path)
    assert "outside the 90 % interval" in describe(row)


@pytest.fixture
def metrics(tmp_path):
    """Metrics of a run with a forecast; is_main: those of rank 0."""

    def make(is_main=True):
        line = ProgressLine(Every(Cadence(10), STEPS), STEPS, 0, is_main)
        prices = Prices(full=6.0, causal=5.0, six_n=4.0, peak=1.0)
        attempt = Run(tmp_path / "run").new_attempt()
        predicted = prediction_interval_of(job(write(tmp_path / "f")))
        return Metrics(
            attempt,
            lambda step: (prices, prices),
            {},
            line,
            [],
            lambda: 1,
            is_main,
            prediction=predicted,
        )

    return make


def score(writer, step, loss, windows=3):
    position = Position(step, 4 * step, D // STEPS * step)
    last = Step(position, 0, {}, 1.0, Facts(torch.zeros(1), 1.0, True), {})
    source = Score(9.9, 0.1, 2.0, 10, 20, windows)
    writer.scored(last.position, {"web": source, "validation": replace(source, loss=loss)})
    return [row for row in read_rows(writer.attempt.events.path) if "forecast" in row["kind"]]


SCORED, MISSED = "forecast_scored", "forecast_missed"
INSIDE = "Forecast 0001: observed loss 2.0100, +0.50 % from the predicted 2.0000, inside"
OUTSIDE = "outside the 90 % interval 1.9000 to 2.1000.\nWarning: the loss is outside"


@pytest.mark.parametrize(
    ("step", "loss", "facts", "kinds", "text"),
    [
        (STEPS - 1, 7.0, {}, [], ""),  # before the end
        (STEPS, 2.01, {}, [SCORED], INSIDE),
        (STEPS, 2.2, {}, [SCORED, MISSED], OUTSIDE),
        (STEPS, 2.2, {"is_main": False}, [], ""),
        (STEPS, math.nan, {"windows": 0}, [], ""),  # no held-out text
    ],
)
def test_rank_0_compares_the_final_loss_over_all_sources(
    metrics, capsys, step, loss, facts, kinds, text
):
    rows = score(metrics(facts.get("is_main", True)), step, loss, facts.get("windows", 3))
    assert [row["kind"] for row in rows] == kinds
    for row in rows:
        assert (row["step"], row["tokens"]) == (STEPS, D)
        assert (row["predicted"], row["observed"]) == (2.0, loss)
        assert (row["inside_50"], row["inside_90"]) == (loss == 2.01, loss == 2.01)
    out = capsys.readouterr().out
    assert out.count(text) == 1 or not kinds
    assert ("orecast" in out, "Warning" in out) == (bool(kinds), MISSED in kinds)


def test_verbs_share_the_forecast_key_and_a_resumed_run_may_change_it():
    plan = compose(PlanJob, ["forecast=tiny/3"])
    submit = compose(SubmitJob, ["forecast=tiny/3", "machine=cpu"])
    assert plan.forecast == submit.training.forecast == "tiny/3"
    old = job("tiny/3")
    assert thaw(TrainJob, freeze(old)).forecast == "tiny/3"
    refusals, numerics, (change,) = may_resume(old, replace(old, forecast=None), 39)
    assert (refusals, numerics, change.key) == ([], [], "forecast")


def test_a_bad_forecast_is_refused_before_anything_is_written(
    small_data, tmp_path, forescale, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = ("train", f"data.path={small_data}", "schedule.warmup=0", "schedule.decay=2")
    err = forescale.refuses(*arguments, "forecast=tiny/1")
    assert err.startswith(
        "forescale: forecast: there is no forecast studies/tiny/forecasts/0001.json"
    )
    write(Path("studies/tiny/forecasts"))
    code, _, err = forescale(*arguments, "forecast=tiny/1")
    assert (code, f"is for N = {N:,}, but this run's model has" in err) == (2, True)
    assert not Path("runs").exists()


@pytest.fixture
def forecast_run(own_run):
    """A complete run of 8 steps and a loss of 3, whose config names a forecast of 2.9 to 3.1."""
    old = thaw(TrainJob, own_run.config)
    n, d = count(old.model).blocks_and_head, old.total_steps * old.tokens_per_step
    points = {"loss": 2.95, "interval_50": [2.94, 2.96], "interval": [2.9, 3.1]}
    path = write(Path("studies/tiny/forecasts"), at(n, d) | points)
    own_run.config.write_text(freeze(replace(old, forecast="tiny/1")))
    return SimpleNamespace(run=own_run, path=path, job=replace(old, forecast="tiny/1"))


def test_status_compares_the_final_loss(forecast_run, forescale):
    text = "Forecast 0001: observed loss 3.0000, +1.69 % from the predicted 2.9500, inside the 90 %"
    assert text in forescale("status", "small")[1], "from the last score: the forecast came later"
    facts = {"step": 8, **prediction_interval_of(forecast_run.job).compare(3.0)}
    forecast_run.run.attempts()[-1].event("forecast_scored", **facts)
    forecast_run.path.unlink()
    assert text in forescale("status", "small")[1], "from the event: the forecast is gone"


def test_status_shows_the_forecast_of_a_run_that_goes_on(forecast_run, forescale):
    change_rows(forecast_run.run.metrics, lambda rows: [*rows[:4], rows[-1] | {"step": 4}])
    text = "Forecast 0001: loss 2.9500 expected at step 8 (90 % interval 2.9000 to 3.1000)."
    assert text in forescale("status", "small")[1]
    forecast_run.path.write_text("{}")
    out = forescale.prints("status", "small")
    assert "The forecast can't be read: studies/tiny/forecasts/0001.json: this forecast" in out


def test_status_shows_the_band_and_the_end_that_the_run_forecasts_anew(forecast_run, forescale):
    change_rows(forecast_run.run.metrics, lambda rows: [*rows[:6], rows[-1] | {"step": 4}])
    attempt = forecast_run.run.attempts()[-1]
    end = {"above": 0.003, "loss": 2.913, "low": 2.88, "high": 2.95, "inside": 0.84, "level": 0.9}
    attempt.event("forecast_anew", step=4, **end)
    attempt.event("forecast_anew", step=7, **end | {"loss": 2.5})  # a step that was not kept
    out = forescale.prints("status", "small")
    assert "At step 4 the loss is 0.3% above its forecast, inside the band; the end is" in out
    assert "anew as 2.9130 (90 %: 2.8800 to 2.9500), 84% inside the preregistered interval." in out
    attempt.event("forecast_left", step=5, since=5, beyond=0.008, reference=None)
    out = forescale.prints("status", "small")
    assert "outside the band" in out
    assert "The loss is 0.8% above its band since step 5, by the forecast." in out
    facts = json.loads(forescale.prints("status", "small", "--json"))["forecast"]
    assert facts == {"step": 4, **end, "left": 5}
    attempt.event("forecast_back", step=6, since=5, beyond=0.0, reference=None)
    assert "inside the band" in forescale.prints("status", "small")


@pytest.mark.distributed
def test_two_ranks_compare_their_final_loss_once(dataset, tmp_path):
    arguments = (
        f"data.path={dataset}",
        "train.tokens=null",
        "train.steps=24",
        "launch.processes=2",
    )
    output = launching.train(tmp_path, "run.name=first", *arguments)
    assert "orecast" not in output
    trained_job = thaw(TrainJob, tmp_path / "first" / "config.yaml")
    n, d = (
        count(trained_job.model).blocks_and_head,
        trained_job.total_steps * trained_job.tokens_per_step,
    )
    curve = {"shares": [0.1, 1.0], "above": [0.1, 0.0], "deviation": [0.01, 0.001], "runs": 3}
    end = {"tokens": d, **NARROW, "curve": curve | {"schedule": "wsd", "decay": 0.2}}
    facts = at(n, d) | {"points": [end]}
    write(tmp_path / "studies/tiny/forecasts", facts)  # a loss of 2: far below
    output = launching.train(tmp_path, "run.name=second", *arguments, "forecast=tiny/1")
    text = "Forecast 0001: loss 2.0000 expected at step 24 (90 % interval 1.9000 to 2.1000)."
    assert output.count(text) == 1
    text = "Warning: the loss is outside the prediction interval of studies/tiny/forecasts/0001"
    assert output.count(text) == 1
    kinds = launching.events(tmp_path / "second")
    kinds = [kind for kind in kinds if "forecast" in kind]
    assert kinds == ["forecast_left", "forecast_scored", "forecast_missed"]
    assert output.count("above its band since step 10, by the forecast.") == 1
    assert launching.rows(tmp_path / "second")[-1]["band"]["center"] == 2.0
    assert launching.trajectory(tmp_path / "second") == launching.trajectory(tmp_path / "first")
