"""`forescale plan`: its output, and that it loads no torch."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.engine.deepspeed_config import deepspeed_config
from forescale.plan.config import PlanJob
from forescale.plan.plan import Plan

ROOT = Path(__file__).parents[3]
BIG = ["model=llama-7b", "optimizer=adamw", "train.tokens=1e11", "train.sequence_length=4096",
       "plan.divisions=0"]  # fmt: skip
SHORT = ["model=tiny", "train.steps=100", "schedule.warmup=0"]
BATCH = "train.global_batch=1024"


def test_page_of_a_large_job(forescale, small_data):
    code, out, err = forescale(
        "plan", "night", "data=dataset", f"data.path={small_data}", *BIG, BATCH, "engine=zero3",
        "plan.gpus=64", "train.micro_batch=2", "plan.gpu_hour=2.5", "plan.deepspeed=true",
    )  # fmt: skip
    assert (code, err) == (0, "")
    for fact in ("runs/night on 64 H100", "in 8 nodes", "6,738,415,616 parameters", "zero3-hpz8",
                 "largest micro-batch", "between nodes",
                 "decoding keeps 2.15 GB for a sequence of 4,096",
                 "GPU-hours", "16,384 ranks", "Daly",
                 "Exact: a resumed run repeats",
                 "at 2.5 per GPU-hour", '"stage": 3', "kWh"):  # fmt: skip
        assert fact in out
    assert max(map(len, out.splitlines())) < 300


def test_experts_that_a_token_does_not_use_are_told_apart(forescale, small_data, planned):
    data = ["data=dataset", f"data.path={small_data}"]
    code, out, err = forescale("plan", *data, *SHORT, "model.mlp=moe", "plan.gpus=1")
    assert (code, err) == (0, "")
    total, active = (int(n.replace(",", "")) for n in re.findall(r"([\d,]{7,}) (?:para|act)", out))
    assert total > 1.4 * active
    _, dense, _ = planned(*SHORT, "plan.gpus=1")
    _, sparse, _ = planned(*SHORT, "model.mlp=moe", "plan.gpus=1")
    assert sparse["parameters"]["active"] == active
    routers = active - dense["parameters"]["total"]
    assert 0 < routers < 0.01 * active, "by the rule, a token meets as many weights as without"
    err = forescale.refuses("plan", *data, *SHORT, "model.mlp=moe", "model.mlp.top_k=9")
    assert "model.mlp.top_k: a token can't use 9 of 8 experts" in err


def test_json_contains_the_whole_plan(planned):
    code, plan, _ = planned(*BIG, BATCH, "engine=zero2", "plan.nodes=8", "train.micro_batch=4")
    assert code == 0
    assert (plan["gpus"], plan["nodes"], plan["chosen"]) == (64, 8, "zero2")
    assert set(plan["options"]) == {"zero0", "zero1", "zero2", "zero3", "zero3-hpz8"}
    assert plan["options"][plan["cheapest"]]["fits"]
    assert plan["tokens"] == plan["steps"] * 1024 * 4096
    for option in plan["options"].values():
        assert sum(option["bytes"].values()) == option["total_bytes"]
        assert option["fits"] == (option["total_bytes"] <= plan["available_bytes"])
        assert option["step"]["seconds"] > 0
    assert plan["decoding_cache_bytes"] == 2 * 4096 * 4096 * 32 * 2  # keys and values, bf16
    assert plan["exact"]
    assert not planned(*BIG, BATCH, "plan.gpus=8", "train.deterministic=false")[1]["exact"]
    job = compose(PlanJob, [*BIG, BATCH, "engine=zero2", "plan.nodes=8", "train.micro_batch=4"])
    assert plan["deepspeed"] == deepspeed_config(job, 64)
    assert plan["failures"]["16384"]["mtbf"] == pytest.approx(86_400_000 / 3.8 / 2048)


RANGE = [*BIG, BATCH, "train.micro_batch=1", "plan.nodes=1-9", "plan.gpu_hour=2"]


def test_rounds_with_other_clusters_and_the_link_from_which_they_pay(planned):
    names = ["outer.every='500 steps'", "outer.members=[a,b,c]", "outer.member=a"]
    names += ["outer.store=s3://bucket/run", "engine=zero2", "plan.gpus=64"]
    _, plan, _ = planned(*BIG, BATCH, *names, "outer.link=1e9")
    rounds, weights = plan["outer"], 4 * plan["parameters"]["total"]
    assert (rounds["sent_bytes"], rounds["received_bytes"]) == (weights, 2 * weights)
    assert rounds["seconds"] == pytest.approx(3 * weights / 1e9)
    step = plan["options"]["zero2"]["step"]["seconds"]
    assert rounds["training_seconds"] == pytest.approx(500 * step)
    _, at_needed, _ = planned(*BIG, BATCH, *names, f"outer.link={rounds['needed_link']}")
    assert at_needed["outer"]["share"] == pytest.approx(0.05)
    beside = math.floor(rounds["seconds"] / step) - 1
    words = ("outer.every='4000 steps'", f"outer.overlap='{beside} steps'")
    _, late, _ = planned(*BIG, BATCH, *names, "outer.link=1e9", *words)
    stands = rounds["seconds"] - beside * step
    assert late["outer"]["standing_seconds"] == pytest.approx(stands)
    assert late["checkpoint"]["bytes"] == plan["checkpoint"]["bytes"] + weights
    _, alone, _ = planned(*BIG, BATCH, "engine=zero2", "plan.gpus=64")
    assert plan["checkpoint"]["bytes"] == alone["checkpoint"]["bytes"] + 2 * weights
    assert "outer" not in alone
    hours = [each["gpu_hours"] for each in (at_needed, alone)]
    assert hours[0] == pytest.approx(hours[1] / 0.95, rel=0.01)


def test_the_sizes_of_a_range_and_the_largest_that_fits(planned, forescale, tmp_path):
    page = f"plan.to={tmp_path / 'plan.html'}"
    code, plan, _ = planned(*RANGE, "engine=zero3", page)
    assert (code, plan["nodes"], plan["gpus"]) == (0, 8, 64)
    assert [size["nodes"] for size in plan["sizes"]] == [8, 4, 2, 1], "1,024 divides by them"
    for size in plan["sizes"]:
        _, alone, _ = planned(*RANGE, "engine=zero3", f"plan.nodes={size['nodes']}")
        option = alone["options"]["zero3"]
        assert size["ranks"] == 8 * size["nodes"]
        assert size["micro_batches"] * size["ranks"] == 1024
        assert size["memory_bytes"] == option["total_bytes"]
        assert size["step_seconds"] == option["step"]["seconds"]
        assert (size["gpu_hours"], size["cost"]) == (alone["gpu_hours"], alone["cost"])
    assert "sizes" in (tmp_path / "plan.html").read_text()
    out = forescale("plan", *RANGE, "engine=zero3")[1]
    assert re.search(r"8 nodes \* +64 +16 .*yes", out)


def test_a_size_that_does_not_fit_is_named_and_not_chosen():
    words = ["engine=zero3", "machine.memory_bytes=20e9"]
    plan = Plan(compose(PlanJob, [*RANGE, *words]))
    fits = {n: size.chosen.fits(size.available) for n, size in plan.sizes.items()}
    assert plan.fitting_sizes == [n for n, it_fits in fits.items() if it_fits]
    assert 0 < len(plan.fitting_sizes) < len(fits)
    assert plan.job.world_size == 8 * plan.fitting_sizes[0]
    assert "These sizes don't fit in memory and are not used: 1." in plan.notes
    assert not plan.problems
    assert not Plan(compose(PlanJob, [*RANGE, "plan.nodes=8"])).sizes


def test_the_micro_batch_is_said_to_be_limited_by_the_global_batch_or_by_memory(forescale, planned):
    words = [*BIG, "engine=zero3", "plan.gpus=64", "train.micro_batch=1"]

    def sizes(batch, *keys):
        _, plan, _ = planned(*words, f"train.global_batch={batch}", *keys)
        option = plan["options"]["zero3"]
        return option["largest_micro_batch"], option["memory_micro_batch"]

    few, room = sizes(128)
    assert (few, room > 8) == (2, True)
    # With a batch that is large enough, the memory limits, where the first plan said.
    assert sizes(64 * room) == (room, room)
    assert sizes(2**40, "train.tokens=1e17")[0] == 2 ** (room.bit_length() - 1)
    _, out, _ = forescale("plan", *words, "train.global_batch=128")
    assert re.search(r"limited by( +(memory|global batch)){3} +global batch", out)


def test_the_cheapest_stage_that_fits_is_named_and_can_be_chosen(forescale):
    def cheapest(*keys):
        page = forescale("plan", *BIG, BATCH, "plan.gpus=8", "train.micro_batch=1", *keys)[1]
        return re.search(r"Cheapest that fits: (.*)", page)[1]

    other = re.fullmatch(r"zero1, [\d.]+ s a step: set (\S+)", cheapest("engine=zero2"))[1]
    assert re.fullmatch(r"zero1, [\d.]+ s a step, as configured\.", cheapest(other))
    same = cheapest("engine=zero3", "plan.mfu=0.4")
    assert same.endswith("; zero3, as configured, is as fast.")


def test_numbers_far_from_published_ones_are_noted(planned):
    _, plan, _ = planned("plan.gpus=1", "model=llama-1b")
    assert len([note for note in plan["notes"] if "add recipe=llama-1b, or set" in note]) == 2


def test_an_encoder_decoder_is_planned_before_its_data_exists(forescale, tmp_path, monkeypatch):
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path))
    code, out, err = forescale("plan", "recipe=t5-small", "plan.gpus=8")
    assert (code, err) == (0, "")
    assert "60,506,624 parameters" in out


def test_checkpointing_that_is_not_needed_is_noted_and_can_be_switched_off(planned):
    words = [*BIG, BATCH, "engine=zero3", "plan.gpus=64"]
    fix = "model.activation_checkpointing=none"

    def hints(*extra):
        code, plan, _ = planned(*words, *extra)
        assert code == 0
        return [note for note in plan["notes"] if fix in note]

    assert len(hints("train.micro_batch=1")) == 1
    assert hints("train.micro_batch=1", fix) == []
    assert hints("train.micro_batch=16") == []  # would not fit without
    fix = "model.activation_checkpointing=selective"  # then the cheapest that fits
    assert hints("train.micro_batch=1") == []
    assert len(hints("train.micro_batch=4", "train.sequence_length=5120")) == 1


def test_guesses_are_named_with_the_keys_that_set_them(forescale):
    words = ("plan", *BIG, BATCH, "engine=zero3", "plan.gpus=64", "train.micro_batch=1")

    def guesses(*extra):
        page = forescale(*words, *extra)[1]
        return set(re.findall(r"(?:plan|machine)\.\w+", page[page.index("Guess ") :]))

    speed = {"machine.efficiency", "machine.attention_efficiency", "plan.from_run"}
    network = {"machine.inter_latency"}
    failing = {"plan.failures", "plan.restart"}
    links = {"machine.link_efficiency", "machine.intra_latency"}
    every = speed | network | failing | links | {"machine.node_write"}
    assert guesses() == every
    assert guesses("plan.gpus=8", "plan.mfu=0.4", "plan.failures=0") == links | {
        "machine.node_write"
    }
    assert guesses("machine.launch=1") == every | {"machine.launch"}


def test_amounts_have_the_units_that_people_use(forescale):
    words = (*BIG, BATCH, "engine=zero3", "plan.gpus=64", "train.micro_batch=1")
    _, out, _ = forescale("plan", *words, "train.tokens=1e12", "checkpoint.keep=100")
    assert "(533 PFLOP-days) in total" in out
    assert "at most 102 on disk: 8.25 TB" in out
    assert re.search(r"\d d for all steps; \d+,\d{3} GPU-hours", out)
    _, out, _ = forescale("plan", *words, "plan.failures=0")
    assert "none expected (plan.failures=0)" in out
    assert not re.search(r"\binf\b", out)


def test_plan_loads_no_torch_and_writes_nothing(tmp_path):
    words = ["plan", *SHORT]
    code = f"import sys; from forescale.cli import main; code = main({words!r})\n"
    code += "print([m for m in ('torch', 'deepspeed', 'accelerate') if m in sys.modules], code)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FORESCALE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.endswith("[] 0\n"), done
    assert "is not prepared yet" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_all_config_mistakes_are_reported_together(forescale):
    err = forescale.refuses(
        "plan",
        "modl=x",
        "train.stpes=3",
        "engine=zero9",
        "machine.peak=1",
        "precision.kind=bf17",
        "plan.restart='3 steps'",
    )
    for key in ("modl", "train.stpes", "engine", "machine.peak", "precision.kind", "plan.restart"):
        assert re.search(rf"{re.escape(key)}: ", err), key
    err = forescale.refuses("plan", "plan.gpus=12", "train.global_batch=7", "train.micro_batch=7")
    assert "plan.gpus: 12 GPUs don't fill nodes of 8; write plan.gpus=16." in err
    assert "train.global_batch: 7 windows don't divide by 12 ranks" in err


def test_problems_of_data_and_memory_are_reported_together(forescale, tmp_path):
    code, out, err = forescale("plan", "data=dataset", f"data.path={tmp_path}", *BIG, BATCH)
    assert code == 2
    assert "not a dataset" in err
    assert re.search(r"memory: a rank needs [\d.,]+ GiB .* a GPU has 79.1", err)
    assert "Memory of a rank" in out  # the page is printed nevertheless


def test_a_missing_forecast_is_a_problem(planned):
    code, _, err = planned(*SHORT, "forecast=none/3")
    assert code == 2
    assert "there is no forecast studies/none/forecasts/0003.json" in err


def test_tokens_read_and_epochs_of_a_source(planned, small_data):
    code, plan, _ = planned(*SHORT)
    (source,) = plan["sources"]
    assert code == 0
    assert source["read"] == pytest.approx(100 * 8 * 256, rel=0.01)
    assert source["epochs"] == pytest.approx(source["read"] / source["tokens"])
    assert any("teaches little" in note for note in plan["notes"])


def test_a_source_over_its_maximum_epochs_is_a_problem(forescale, small_data):
    mixture = ["data=mixture", f"data.sources={{a: {small_data}, b: {small_data}}}"]
    code, out, err = forescale("plan", *SHORT, *mixture, "data.max_epochs={a: 2}")
    assert code == 2
    assert "data.max_epochs.a: the run reads a" in err
    assert "b: " in out


def test_step_time_from_a_measured_run(forescale, own_run, small_data):
    """The measured run has 8 steps of 2 s on two ranks."""
    words = ["plan.from_run=small", "machine=cpu", "logging.peak_flops=1e12", "plan.gpus=2"]
    code, out, _ = forescale("plan", *words, *SHORT, "train.micro_batch=4", "--json")
    plan = json.loads(out)
    assert code == 0
    measured = plan["measured"]
    assert (measured["ranks"], measured["step_seconds"]) == (2, 2.0)
    assert measured["predicted_step_seconds"] > 0
    step = plan["options"]["zero1"]["step"]
    price = plan["flops_per_token"]
    flops = (price["full"] + price["recomputed"]) * 8 * 256 / 2
    assert step["seconds"] == pytest.approx(flops / measured["flops_per_second"])
    code, out, _ = forescale("plan", *words, *SHORT, "train.micro_batch=4")
    assert "small: a step took 2 s on 2 ranks (median of" in out
    assert "predicted without it" in out


def test_a_missing_run_as_from_run_is_a_problem(forescale, tmp_path):
    err = forescale.refuses("plan", *SHORT, "plan.from_run=nobody", f"run.root={tmp_path}")
    assert "nobody: no run" in err


def test_step_time_from_a_given_mfu(planned):
    _, plan, _ = planned(*BIG, BATCH, "engine=zero3", "plan.gpus=64", "plan.mfu=0.4")
    step = plan["options"]["zero3"]["step"]
    assert step["mfu"] == pytest.approx(0.4)
    full = plan["flops_per_token"]["full"]
    assert step["seconds"] == pytest.approx(full * 1024 * 4096 / (0.4 * 989e12 * 64))


def test_no_times_without_a_known_peak(planned):
    code, plan, _ = planned(*SHORT, "machine=cpu")
    assert code == 0
    assert plan["seconds"] is None
    assert plan["options"]["zero1"]["step"]["computing"] is None


def test_disk_space_and_the_time_to_save_after_a_signal(planned):
    words = [*BIG, BATCH, "engine=zero3", "plan.gpus=64", "checkpoint.every='1000 steps'"]
    keep = ["checkpoint.keep=3", "checkpoint.keep_every='5000 steps'", "checkpoint.keep_best=true"]
    _, plan, _ = planned(*words, *keep)
    saves = plan["checkpoint"]
    assert saves["bytes"] == 12 * 6_738_415_616
    assert (
        saves["max_on_disk"] == 3 + 1 + 1 + plan["steps"] // 5000 + 1
    )  # the last: before the decay
    assert saves["save_seconds"] == pytest.approx(saves["bytes"] / 16e9)
    # A rank's 1.26 GB in page-locked memory are 2 GiB, which eight ranks of a node have each.
    assert saves["copy_bytes_of_node"] == 8 * 2**31
    _, plan, _ = planned(*words, "launch.grace='5 s'")
    assert any("launch.grace" in note for note in plan["notes"])
    _, plan, _ = planned(*words, "checkpoint.background=false")
    assert plan["checkpoint"]["copy_bytes_of_node"] == 0
    _, plan, _ = planned(*SHORT, "machine=cpu", "plan.gpus=2", "train.micro_batch=4")
    assert plan["checkpoint"]["copy_bytes_of_node"] == plan["checkpoint"]["bytes"]


def test_a_model_class_of_the_user(planned, tmp_path, monkeypatch):
    (tmp_path / "ownmodel.py").write_text(
        "from torch import nn\n"
        "class Model(nn.Module):\n"
        "    def __init__(self, width, vocab_size):\n"
        "        super().__init__()\n"
        "        self.embedding = nn.Embedding(vocab_size, width)\n"
        "        self.hidden = nn.Linear(width, width)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, plan, _ = planned("model._target_=ownmodel.Model", "model.width=64", "train.steps=100")
    assert code == 0
    assert plan["parameters"] == {"total": 300 * 64 + 64 * 64 + 64}
    assert plan["options"]["zero1"]["activations"] is None
    assert plan["decoding_cache_bytes"] is None
    assert any("The model is a class of your own" in note for note in plan["notes"])


def test_a_plan_for_2048_nodes(planned):
    large = ["train.global_batch=16384", "train.micro_batch=1", "train.tokens=1e13"]
    code, plan, _ = planned(*BIG, "engine=zero3", "plan.gpus=16384", *large)
    assert code == 0
    assert plan["nodes"] == 2048


def test_plan_keys_do_not_change_what_is_trained():
    job = compose(PlanJob, SHORT)
    train = compose(TrainJob, SHORT)
    for name in ("train", "model", "data", "optimizer", "schedule", "engine", "checkpoint"):
        assert getattr(job, name) == getattr(train, name)
    assert Plan(job).chosen.name == "zero1"


def test_the_plan_of_an_existing_run_is_judged_as_train_would(own_run, forescale):
    err = forescale.refuses("plan", "small", "train.seed=5", "plan.gpus=1", "machine=cpu")
    assert "another config: train.seed: 1337 -> 5" in err
    err = forescale.refuses("plan", "small", "run.resume=never", "plan.gpus=1", "machine=cpu")
    assert "run.resume" in err
    code, _, err = forescale("plan", "small", "plan.gpus=1", "machine=cpu")
    assert (code, err) == (0, "")


def test_the_plan_of_a_branch_is_judged_as_train_would(own_run, forescale, small_data):
    words = ("branch", "run.from.run=small", "train.steps=8", f"data.path={small_data}")
    err = forescale.refuses("plan", *words, "machine=cpu", "plan.gpus=1")
    assert "run.from: this run would end at step 8, and small is at step 8 already" in err


def test_an_encoder_does_not_decode(planned):
    code, plan, _ = planned(*SHORT, "model.causal=false", "objective=masked")
    assert code == 0
    assert plan["decoding_cache_bytes"] is None


def test_decoding_keeps_the_source_and_its_keys_and_values(planned):
    row, source = 512, 419  # of a window of 466 tokens 70 are noise, in 23 spans
    words = ["model.encoder_layers=2", "objective=seq2seq", f"train.sequence_length={row}"]
    code, plan, _ = planned(*SHORT, *words, "model.num_layers=3", "model.width=128")
    assert code == 0
    values = source * 128 + 3 * 2 * 128 * row
    assert plan["decoding_cache_bytes"] == values * 2


def test_fp8_is_planned_for_a_machine_that_has_it(planned, forescale):
    fp8 = [*SHORT, "precision=bf16", "precision.fp8=tensorwise", "plan.gpus=1"]
    code, _, err = planned(*fp8)
    assert (code, err) == (0, "")
    for machine, name in (("a100-80g", "A100"), ("cpu", "CPU")):
        err = forescale.refuses("plan", *fp8, f"machine={machine}")
        assert re.search(rf"precision.fp8: {name}.* does not multiply fp8 \(machine.fp8=false", err)
    assert "multiples of 16" in forescale.refuses("plan", *fp8, "model.mlp_width=40")


def test_the_page_has_the_rows_of_the_text(forescale, small_data, tmp_path):
    words = ["plan", "night", "data=dataset", f"data.path={small_data}", *BIG, BATCH]
    code, out, _ = forescale(*words, "engine=zero3", "plan.gpus=64", f"plan.to={tmp_path}/p.html")
    html = (tmp_path / "p.html").read_text()
    assert code == 0
    for fact in ("6,738,415,616 parameters", "zero3-hpz8", "16,384 ranks", "machine.node_write"):
        assert fact in out
        assert fact in html
