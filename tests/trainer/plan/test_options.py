"""The cheapest way to shard: the fastest that fits, and of equally fast ones the simplest."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from forescale.config.compose import compose
from forescale.plan.bytes.parameters import inventory
from forescale.plan.config import PlanJob
from forescale.plan.options import ShardingOption, ShardingOptions, cheapest
from forescale.plan.plan import Plan
from forescale.plan.step_time import token_flops


@dataclass
class Option:
    """What `cheapest` reads of a ShardingOption."""

    name: str
    need: float
    seconds: float | None

    is_as_fast_as = ShardingOption.is_as_fast_as

    @property
    def step(self):
        return SimpleNamespace(seconds=self.seconds)

    def fits(self, available):
        return self.need <= available


def best(available, *seconds):
    options = [Option(f"zero{n}", 100 - 20 * n, s) for n, s in enumerate(seconds)]
    best = cheapest(options, available)
    return best and best.name


def test_the_fastest_that_fits():
    assert best(1000, 1.0, 1.2, 1.3, 0.9) == "zero3"
    assert best(1000, 1.0, 0.9, 1.3, 1.4) == "zero1"
    assert best(70, 0.1, 0.2, 1.3, 1.4) == "zero2"
    assert best(10, 0.1, 0.2, 1.3, 1.4) is None


def test_of_equally_fast_ones_the_first():
    assert best(90, 1.0, 1.005, 1.0, 0.999) == "zero1"


def test_without_a_speed_the_first_that_fits():
    assert best(70, None, None, None, None) == "zero2"
    assert best(10, None, None, None, None) is None


def longest(*words):
    """The longest window that fits, and the options and the job that say so."""
    command = [
        "model=llama-1b",
        "model.activation_checkpointing=full",
        "machine=h100-sxm",
        "plan.gpus=8",
        "engine=zero2",
        "precision=bf16",
    ]
    job = compose(PlanJob, [*command, "train.global_batch=64", *words])
    most = job.model.max_sequence_length
    job = replace(job, model=job.model.resolved(32_000, job.train.sequence_length))
    per_token = token_flops(job.model, job.lora, job.train.sequence_length, 0.0)
    options = ShardingOptions(inventory(job), per_token, job.machine, job.plan, None, most)
    return options.longest_window(job), options, job


def test_the_longest_window_fits_and_a_longer_one_does_not():
    window, options, job = longest()
    for length, fits in ((window, True), (window + 256, False)):
        train = replace(job.train, sequence_length=length, micro_batch=1)
        assert options.fits(replace(job, train=train)) == fits
    # Its activations are divided; but for outputs that came back, so is what fits.
    divided, _, _ = longest("engine.sequence_parallel=8")
    assert 6 * window < divided < 8 * window
    whole, _, _ = longest("engine.sequence_parallel=8", "model.activation_checkpointing=none")
    chunks, _, _ = longest("engine.sequence_parallel=8", "model.mlp.chunk=4096")
    assert whole < divided < chunks


@pytest.mark.parametrize(
    ("window", "words"),
    [
        (418_816, []),
        (3_252_224, ["engine.sequence_parallel=8"]),
        (569_600, ["model.mlp.chunk=4096"]),
        (4_374_528, ["model.mlp.chunk=4096", "engine.sequence_parallel=8"]),
    ],
)
def test_the_longest_windows_that_the_readme_names(window, words):
    assert longest(*words)[0] == window
    readme = Path(__file__).parents[3] / "trainer/plan/README.md"
    assert f"{window:,}" in readme.read_text()


def test_a_longest_window_is_no_longer_than_the_config_allows():
    # Of 8,187 columns each of 8 ranks has at most 1,023.
    for ranks, most in ((1, 8_187), (8, 8_184)):
        words = ["model.max_sequence_length=8187", f"engine.sequence_parallel={ranks}"]
        assert longest(*words)[0] == most
    # A limit that is too long to fit changes nothing.
    assert longest("model.max_sequence_length=9999999")[0] == longest()[0]
    # The length that the config leaves out is that of training, which is no limit.
    plan = Plan(compose(PlanJob, ["train.steps=10", "model.max_sequence_length=512"]))
    assert plan.chosen.longest_window == 512
    assert Plan(compose(PlanJob, ["train.steps=10"])).chosen.longest_window > 512


def test_a_table_of_learned_positions_grows_with_the_window():
    window, _, _ = longest("model.position=learned")
    for length, fits in ((window, True), (window + 256, False)):
        words = ["model.position=learned", f"model.max_sequence_length={length}"]
        _, options, job = longest(*words)
        train = replace(job.train, sequence_length=length, micro_batch=1)
        assert options.fits(replace(job, train=train)) == fits


@pytest.mark.parametrize(
    "words",
    [
        ["model.mlp.chunk=64"],
        ["engine.expert_parallel=2", "model.mlp=moe", "engine=zero2"],
        ["engine.tensor_parallel=2", "model.mlp.chunk=64", "machine.gpus_per_node=2"],
    ],
)
def test_nothing_is_proposed_that_the_config_refuses(words):
    keys = [
        "train.steps=10",
        "model.activation_checkpointing=full",
        "plan.gpus=8",
        "train.global_batch=16",
    ]
    plan = Plan(compose(PlanJob, [*keys, "train.micro_batch=1", *words]))
    assert not any("selective" in note for note in plan.notes)
    assert all("hpz" not in option.name for option in plan.options) or "tensor" not in words[0]
