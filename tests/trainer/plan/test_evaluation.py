"""The price of evaluation in `forescale plan`: windows as they are read, steps as they are due."""

import json

import pytest
import torch

from forescale.config.compose import compose
from forescale.config.duration import Duration
from forescale.data.bins import num_windows
from forescale.data.dataset import Dataset, Sources
from forescale.data.objective import IGNORED
from forescale.data.stream import validation_windows
from forescale.engine.ranks import Ranks
from forescale.plan.config import PlanJob
from forescale.plan.evaluation import estimate_evaluation
from forescale.plan.step_time import StepTime, TokenFlops
from forescale.run.abilities import questions_of_job
from forescale.train.abilities import accuracies
from forescale.train.callbacks import Every

PRICE = TokenFlops(full=300.0, causal=200.0, six_n=100.0, forward=100.0, recomputed=100.0)
SIZES = ["train.sequence_length=32", "train.global_batch=8", "train.micro_batch=2"]


def cost(dataset, *words, seconds=None, world=2):
    job = compose(PlanJob, [*SIZES, "schedule.warmup=0", *words])
    tokens = job.tokens_per_step
    step = StepTime(seconds, 0.0, 0.0, tokens, 300.0 * tokens, None)
    windows = [num_windows(dataset.split("validation"), 32)] if dataset else None
    return estimate_evaluation(job, windows, PRICE, step, world)


@pytest.mark.parametrize("limit", [None, 5, 10_000])
def test_windows_and_work_are_those_that_ranks_really_evaluate(small_data, limit):
    dataset = Dataset(small_data)
    estimate = cost(dataset, "train.steps=10", f"validation.windows={limit or 'null'}", seconds=8.0)
    ranks = [
        list(validation_windows(dataset.split("validation"), 32, 2, r, 2, limit)) for r in (0, 1)
    ]
    real = sum(int((m.targets != IGNORED).any(1).sum()) for rank in ranks for m in rank)
    assert estimate.periodic.windows == real > 0
    assert estimate.periodic.flops == real * 32 * 100.0  # the forward is a third of 300
    # Padding included: as many micro-batches on each rank, of a step's time for 8 windows.
    rows = 2 * 2 * len(ranks[0])
    assert estimate.periodic.seconds == pytest.approx(8.0 * rows / 8 * 100 / (300 + 100))
    assert estimate.at_end.windows >= estimate.periodic.windows


@pytest.mark.parametrize("every", ["3 steps", "5 steps", "20 %", "100 %", "700 tokens"])
def test_evaluations_are_counted_as_they_are_due(every):
    length = Duration.parse(every)
    job = compose(PlanJob, [*SIZES, "train.steps=20", "schedule.warmup=0"])
    due = Every(job.cadence(length), 20)
    estimate = cost(None, "train.steps=20", f"validation.every='{every}'")
    assert estimate.times + 1 == sum(due(step) for step in range(1, 21))
    assert estimate.seconds is None


def test_evaluations_by_the_clock_need_a_speed():
    words = ("train.steps=21", "validation.every='1 min'")
    assert cost(None, *words).times is None
    assert cost(None, *words).flops is None
    assert cost(None, *words, seconds=10.0).times == 3


def test_the_plan_shows_time_and_flops_of_each_and_of_all(forescale, small_data):
    words = ["plan", f"data.path={small_data}", "data=dataset", "model=tiny", "train.steps=100",
             "schedule.warmup=0", "validation.every=20", "validation.windows=1",
             "machine=cpu", "plan.mfu=0.5", "logging.peak_flops=1e11"]  # fmt: skip
    out = forescale.prints(*words)
    assert "Evals  every 20 steps: 1 window, " in out
    assert "; at the end all " in out
    assert "5 evaluations: " in out
    assert "% of the time with the steps" in out
    plan = json.loads(forescale.prints(*words, "--json"))
    facts = plan["evaluation"]
    assert facts["times"] == 4
    total = 4 * facts["periodic"]["seconds"] + facts["at_end"]["seconds"]
    assert facts["seconds"] == pytest.approx(total)
    assert plan["gpu_hours"] * 3600 > plan["seconds"] + facts["seconds"]


def test_an_evaluation_longer_than_the_grace_of_a_stop_is_noted(forescale, small_data):
    words = ["plan", f"data.path={small_data}", "data=dataset", "model=tiny", "train.steps=100",
             "schedule.warmup=0", "machine=cpu", "plan.mfu=0.5"]  # fmt: skip
    _, out, _ = forescale(*words, "logging.peak_flops=1e6")
    assert "Lower validation.windows" in out
    _, out, _ = forescale(*words, "logging.peak_flops=1e13")
    assert "Lower validation.windows" not in out


ABILITIES = ("validation.abilities=[copy,recall]", "validation.questions=9")


@pytest.mark.parametrize(("world", "sequence"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_questions_cost_the_tokens_that_ranks_really_compute(small_data, world, sequence):
    words = [*SIZES, *ABILITIES, "schedule.warmup=0", "train.steps=10", "validation.every=2"]
    words += [
        "train.sequence_length=192",
        f"engine.sequence_parallel={sequence}",
        f"launch.processes={sequence}",
    ]
    job, dataset = compose(PlanJob, words), Dataset(small_data)
    questions = questions_of_job(job, Sources({"data": dataset}))
    tokens = 0

    def judge(tokens_BL, targets_BL):
        nonlocal tokens
        tokens += tokens_BL.numel()
        zeros = torch.zeros(len(tokens_BL))
        return zeros, zeros

    ranks = world // sequence

    class Alike(Ranks):
        """What the others answer is of no interest, but rank 0 needs all answers."""

        def reduce_on_main(self, value, work):
            return work([[(i, 0, 0.0) for i in range(sum(len(q.rows) for q in questions))]])

    for rank in range(ranks):
        accuracies(judge, questions, multiple=sequence, ranks=Alike(rank, ranks))
    step = StepTime(8.0, 0.0, 0.0, job.tokens_per_step, 300.0 * job.tokens_per_step, None)
    estimate = estimate_evaluation(job, [10], PRICE, step, world, questions=questions)
    alone = estimate_evaluation(job, [10], PRICE, step, world)
    assert estimate.abilities.questions == 2 * 2 * 9  # two tasks after 0 and 4 examples
    assert estimate.abilities.tokens == tokens > 0
    assert estimate.abilities.flops == tokens * 100.0
    took = 8.0 * tokens * 100 / (400 * job.tokens_per_step)
    assert estimate.abilities.seconds == pytest.approx(took)
    assert estimate.periodic_seconds == pytest.approx(alone.periodic.seconds + took)
    assert estimate.seconds == pytest.approx(alone.seconds + 5 * took)  # steps 2, 4, 6, 8 and 10
    assert estimate.flops == pytest.approx(alone.flops + 5 * tokens * 100)


def test_the_plan_shows_what_questions_cost_or_that_it_is_not_known(forescale, small_data):
    words = ["plan", "model=tiny", "train.steps=100", "train.sequence_length=192", *ABILITIES,
             "schedule.warmup=0", "machine=cpu", "plan.mfu=0.5", "validation.windows=1",
             "logging.peak_flops=1e11"]  # fmt: skip
    known = [*words, "data=dataset", f"data.path={small_data}"]
    assert "abilities, each time: 36 questions, " in forescale.prints(*known)
    abilities = json.loads(forescale(*known, "--json")[1])["evaluation"]["abilities"]
    assert abilities["questions"] == 36
    assert abilities["seconds"] > 0
    none = json.loads(forescale(*known, "validation.abilities=[]", "--json")[1])
    assert none["evaluation"]["abilities"] is None
    err = forescale.refuses(*known, "train.sequence_length=32")
    assert "validation.shots: 4 examples of copy and a question need " in err


def test_without_data_the_windows_of_the_config_are_counted(forescale, tmp_path, monkeypatch):
    words = ("train.steps=10", "validation.every=2", "validation.windows=6")
    estimate = cost(None, *words, seconds=8.0)
    assert (estimate.periodic.windows, estimate.times, estimate.at_end) == (6, 4, None)
    rows = 2 * 2 * 2  # 6 windows on two ranks: 2 micro-batches of 2 windows each
    assert estimate.seconds == pytest.approx(4 * 8.0 * rows / 8 * 100 / (300 + 100))
    assert cost(None, "train.steps=10", "validation.windows=null") is None
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path))
    code, out, _ = forescale("plan", "recipe=llama-7b", "plan.gpus=64", "--json")
    plan = json.loads(out)
    assert code == 0
    alone = plan["seconds"] * 64 / 3600
    evaluating = plan["evaluation"]["seconds"] * 64 / 3600
    assert evaluating > 0
    assert plan["gpu_hours"] > alone + evaluating
