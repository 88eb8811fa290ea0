"""What DeepSpeed refuses of `engine.deepspeed` is known before anything is written."""

import subprocess

import pytest

from forescale.config.compose import compose
from forescale.config.schema import ConfigError
from forescale.config.train import TrainJob
from forescale.engine import deepspeed_check
from forescale.engine.build import check_world
from forescale.engine.deepspeed_check import problems_apart, problems_here
from forescale.plan.config import PlanJob
from forescale.plan.plan import Plan

ZERO = "zero_optimization"


def job(settings, *words, of=TrainJob):
    return compose(of, ["train.steps=2", f"engine.deepspeed={settings}", *words])


def problems(settings, *words):
    refusals = problems_here(job(settings, *words), 2)
    return {p.key.removeprefix("engine.deepspeed."): (p.problem, p.todo) for p in refusals}


@pytest.mark.parametrize(
    ("settings", "key", "problem"),
    [
        ("{zero_optimization: {mics_shard_size: 2}}", f"{ZERO}.mics_shard_size", "MiCS"),
        ("{nonsense: {a: 1}}", "nonsense", "doesn't have"),
        ("{zero_optimization: {overlap_com: true}}", f"{ZERO}.overlap_com", "doesn't have"),
        ("{aio: {threads: 1}}", "aio.threads", "doesn't have"),
        ("{flops_profiler: {depth: 1}}", "flops_profiler.depth", "doesn't have"),
        (
            "{zero_optimization: {offload_optimizer: {pin: true}}}",
            f"{ZERO}.offload_optimizer.pin",
            "doesn't have",
        ),
        ("{zero_optimization: {overlap_comm: maybe}}", f"{ZERO}.overlap_comm", "boolean"),
        ("{prescale_gradients: 5}", "prescale_gradients", "expects true or false"),
        ("{gradient_predivide_factor: much}", "gradient_predivide_factor", "expects a number"),
        ("{comms_logger: 3}", "comms_logger", "must be a mapping"),
    ],
)
def test_each_wrong_setting_is_named(settings, key, problem):
    ((name, (sentence, _)),) = problems(settings).items()
    assert name == key
    assert problem in sentence


def test_all_wrong_settings_are_named_at_once_and_the_right_ones_are_not():
    both = "{comms_loger: {enabled: true}, zero_optimization: {overlap_comm: 7, sub_group_size: 9}}"
    answers = problems(both)
    assert answers.keys() == {"comms_loger", f"{ZERO}.overlap_comm"}
    assert "comms_logger" in answers["comms_loger"][1]


def test_settings_that_only_together_are_wrong_are_a_problem(monkeypatch):
    def refuse(config):
        return "no" if {"dump_state", "memory_breakdown"} <= {*dict.keys(config)} else None

    monkeypatch.setattr(deepspeed_check, "_refusal", refuse)
    (problem,) = problems_here(job("{dump_state: true, memory_breakdown: true}"), 1)
    assert problem[:2] == ("engine.deepspeed", "no")


@pytest.mark.parametrize("words", [("engine=zero1",), ("engine=zero3-offload", "precision=fp16")])
@pytest.mark.parametrize(
    "settings",
    [
        "{zero_optimization: {contiguous_gradients: true, sub_group_size: 1000000}}",
        "{communication_data_type: fp32, comms_logger: {enabled: true}, memory_breakdown: true}",
        "{flops_profiler: {enabled: true}, disable_python_gc: true, dump_state: false}",
        "{aio: {block_size: 4096}, timers: {throughput: {enabled: true}}, log_level: info}",
    ],
)
def test_what_deepspeed_takes_is_no_problem(settings, words):
    assert problems(settings, *words) == {}


def test_ranks_that_have_joined_play_no_part(monkeypatch):
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_rank", lambda: 1)
    monkeypatch.setattr("deepspeed.runtime.config.dist.get_world_size", lambda: 3)
    assert problems("{dump_state: true}") == {}


def test_without_settings_no_process_is_started(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert problems_apart(job("{}"), 8) == []


def test_a_plan_names_them_and_a_rank_that_another_launcher_started_refuses_them():
    wrong = "{zero_optimization: {mics_shard_size: 2}}"
    (problem,) = Plan(job(wrong, of=PlanJob)).problems
    assert problem.key == f"engine.deepspeed.{ZERO}.mics_shard_size"
    with pytest.raises(ConfigError, match="MiCS"):
        check_world(job(wrong), 1)


def test_where_deepspeed_does_not_start_a_plan_says_so(monkeypatch, tmp_path):
    """As on a login node without it."""
    monkeypatch.setattr(deepspeed_check, "__name__", "nowhere")
    deepspeed_check._answer.cache_clear()
    plan = Plan(job("{dump_state: true}", of=PlanJob))
    assert plan.problems == []
    assert any("engine.deepspeed can't be checked" in note for note in plan.notes)


def test_train_refuses_before_a_file_is_written(forescale, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["data=dataset", f"data.path={small_data}", "train.steps=2"]
    err = forescale.refuses("train", *words, "engine.deepspeed={nonsense: 1}")
    assert err.startswith("forescale: engine.deepspeed.nonsense: ")
    assert err.count("\n") == 1
    assert not [*tmp_path.iterdir()]
