"""Adding a mixer, an optimizer, a schedule, an objective or a verb is one file and one line.

Each is shown by a throwaway; metrics and callbacks are shown in tests/trainer/train.

What a reader must write for a new one is what stands in this file, and nothing else.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from forescale import cli, verbs
from forescale.config.compose import compose
from forescale.config.frozen import freeze, thaw
from forescale.config.job import Job
from forescale.config.schema import ConfigError, key
from forescale.config.sections import optimizer as optimizers
from forescale.config.sections.optimizer import OptimizerConfig, Update
from forescale.config.sections.schedule import SCHEDULES, ScheduleConfig
from forescale.config.target import targets
from forescale.config.train import TrainJob
from forescale.data.objective import IGNORED, NEXT_TOKEN
from forescale.data.stream import validation_windows
from forescale.engine.optim import build_optimizer, parameter_groups
from forescale.ground.errors import UserError
from forescale.models import ModelConfig, Transformer, hf
from forescale.models.flops import count, flops_per_token, shapes
from forescale.models.init import Linear
from forescale.models.memory import activations, cache_bytes
from forescale.models.mixers import MIXERS
from forescale.models.mixers.context import continued, earlier
from forescale.models.parametrization import factors, folds, scales
from forescale.models.part import Mixer, below_1, linear
from forescale.plan.bytes.memory import memory
from forescale.plan.bytes.parameters import inventory
from forescale.run.feed import feed_of
from forescale.run.start import open_sources
from forescale.train.model import build_model
from tests.models.configs import changed, model_config
from tests.trainer.data.test_stream import collect


@dataclass(frozen=True)
class Shift(Mixer):
    """A mixer: each token sees itself and a number of tokens before it that are visible to it."""

    tokens: int = 1  # that a token sees before it

    kind = "shift"
    module = f"{__name__}.ShiftModule"
    writes = ("inner",)

    def problems(self):
        return below_1(self, "tokens")

    def shapes(self, config):
        width = config.sizes.width
        return linear("inner", (1 + self.tokens) * width, width, config.bias)

    def activation_bytes(self, config, bytes_per_value, norm_bytes):
        return (1 + self.tokens) * bytes_per_value * config.sizes.width

    def cache_bytes(self, config, length, bytes_per_value):
        return self.tokens * bytes_per_value * config.sizes.width


class ShiftModule(nn.Module):
    def __init__(self, config: ModelConfig, part: Shift):
        super().__init__()
        width, self.tokens = config.sizes.width, part.tokens
        std = scales(config).writing_std
        self.inner = Linear((1 + part.tokens) * width, width, config.bias, std)

    def forward(self, x_BLD: Tensor, context) -> Tensor:
        memory, length = context.memory, x_BLD.shape[1]
        whole = x_BLD if memory is None else memory.keep_last("x", x_BLD, self.tokens)
        visible, count = continued(whole, context)[..., None], torch.ones(())
        columns = [x_BLD]
        for lag in range(1, 1 + self.tokens):
            count = count * earlier(visible.expand(len(whole), -1, -1), lag - 1)
            columns.append((earlier(whole, lag) * count)[:, -length:])
        return self.inner(torch.cat(columns, -1))


SIZES = dict(num_layers=4, width=128, vocab_size=512, max_sequence_length=128)


@pytest.fixture
def shift(monkeypatch) -> ModelConfig:
    monkeypatch.setitem(MIXERS, "shift", Shift)
    return model_config(**SIZES, mixer="shift", position="none")


def test_a_mixer_is_counted_as_it_is(shift):
    model = Transformer(shift)
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert named == shapes(shift)
    assert count(shift).total == sum(p.numel() for p in model.parameters())
    assert model.muon_parameters() >= {"blocks.0.mixer.inner.weight"}
    tokens = torch.zeros(2, 128, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).sum().backward()
    assert counter.get_total_flops() == flops_per_token(shift, 128) * tokens.numel()
    assert cache_bytes(shift, 1000) == 4 * 2 * 128
    attends = changed(shift, mixer="attention")
    assert activations(shift, 1, 128).total < activations(attends, 1, 128).total


def test_a_mixer_stays_within_its_documents(shift):
    model, tokens = Transformer(shift).eval(), torch.randint(0, 512, (1, 8))
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])
    whole = model(tokens, documents_BL=numbers)
    alone = [model(tokens[:, a:b]) for a, b in ((0, 3), (3, 6), (6, 8))]
    torch.testing.assert_close(whole, torch.cat(alone, 1))


def test_a_mixer_decodes_with_a_cache(shift):
    model, tokens = Transformer(shift).eval(), torch.randint(0, 512, (2, 8))
    cache = model.new_cache()
    pieces = [model(piece, cache=cache) for piece in tokens.split([3, 1, 4], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens))


def test_a_mixer_is_parametrised_and_has_no_export(shift):
    wide = changed(
        shift,
        parametrization="completep",
        parametrization__base_width=64,
        parametrization__base_depth=2,
    )
    assert factors(wide)["blocks.0.mixer.inner.weight"].learning_rate == 0.5
    assert folds(wide)["blocks.0.mixer.inner.weight"] == 0.5
    with pytest.raises(ValueError, match=r"mixer=attention \(not shift\)"):
        hf.family_of(shift.resolved())


def test_a_mixer_is_planned_and_trained_by_its_word(shift):
    words = [f"model.{k}={v}" for k, v in SIZES.items()]
    words += [
        "model.mixer=shift",
        "model.position=none",
        "train.steps=20",
        "train.sequence_length=128",
    ]
    job = compose(TrainJob, [*words, "schedule.warmup=0", "model.mixer.tokens=2"])
    other = compose(TrainJob, [*words, "schedule.warmup=0", "model.mixer=attention"])
    mixed, plain = (memory(j, inventory(j), 2) for j in (job, other))
    assert job.model.mixer == Shift(tokens=2)
    assert mixed.states.weights < plain.states.weights
    model = build_model(job, 512)
    tokens = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    groups = parameter_groups(model.named_parameters(), job.optimizer, model.muon_parameters())
    update = torch.optim.AdamW([{"params": g.params} for g in groups], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens, tokens.roll(-1, 1)).mean()
        loss.backward()
        update.step()
        update.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(ConfigError, match=r"model\.mixer\.tokens: 0 is not a size"):
        compose(TrainJob, [*words, "schedule.warmup=0", "model.mixer.tokens=0"])
    with pytest.raises(ConfigError, match=r"model\.mixer: .*none-such.* is not one of"):
        compose(TrainJob, [*words, "schedule.warmup=0", "model.mixer=none-such"])


@dataclass
class SgdConfig(OptimizerConfig):
    """An optimizer."""

    kind = "sgd"
    build = f"{__name__}.build_sgd"
    update = Update(moments=1)

    momentum: float = key(0.9, ge=0, lt=1)  # decay of the momentum


def build_sgd(config: SgdConfig, groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1.0, momentum=config.momentum)


def test_an_optimizer_is_planned_and_built_by_its_spec(monkeypatch):
    monkeypatch.setitem(optimizers.OPTIMIZERS, "sgd", SgdConfig)
    words = ["train.steps=20", "schedule.warmup=0", "precision=fp32", "optimizer=adamw"]
    adam = compose(TrainJob, words)
    sgd = compose(TrainJob, [*words, "optimizer.kind=sgd", "optimizer.momentum=0.5"])
    for job in (adam, sgd):
        job.model = job.model.resolved(512, 256)
    held = inventory(sgd)
    moments = memory(sgd, held, 1).states.moments
    assert moments == 4 * held.numel
    assert memory(adam, inventory(adam), 1).states.moments > 2 * moments
    model = nn.Linear(3, 4)
    groups = parameter_groups(model.named_parameters(), sgd.optimizer)
    built = build_optimizer(sgd.optimizer, [g.as_dict() for g in groups])
    assert isinstance(built, torch.optim.SGD)
    assert built.param_groups[0]["momentum"] == 0.5
    assert [g["name"] for g in built.param_groups] == ["decayed", "undecayed"]


class Halving(torch.optim.SGD):
    """An optimizer of a user's own: halves its learning rate by an argument."""

    def __init__(self, groups, lr, half: bool = False):
        super().__init__(groups, lr=lr / 2 if half else lr)


def test_an_optimizer_of_the_users_own():
    target = f"optimizer._target_={__name__}.Halving"
    words = ["train.steps=20", "schedule.warmup=0", "optimizer=own"]
    job = compose(TrainJob, [*words, target, "optimizer.arguments={half: true}"])
    groups = parameter_groups(nn.Linear(2, 2).named_parameters(), job.optimizer)
    built = build_optimizer(job.optimizer, [g.as_dict() for g in groups])
    assert isinstance(built, Halving)
    assert built.param_groups[0]["lr"] == 0.5
    with pytest.raises(ConfigError, match=r"optimizer\._target_"):
        compose(TrainJob, words)
    wrong = compose(TrainJob, [*words, target, "optimizer.arguments={third: 1}"])
    with pytest.raises(UserError, match="can't be built"):
        build_optimizer(wrong.optimizer, [g.as_dict() for g in groups])


@dataclass
class PowerConfig(ScheduleConfig):
    """A schedule."""

    kind = "power"

    power: float = key(1.0, gt=0)  # exponent of the part of the run that is left

    def rate_after_warmup(self, step: int, total_steps: int, warmup: int, decay: int) -> float:
        return (1 - (step - warmup) / (total_steps - warmup)) ** self.power


def test_a_schedule_is_one_class(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "power", PowerConfig)
    words = ["train.steps=10", "schedule.kind=power", "schedule.power=2", "schedule.warmup=2"]
    job = compose(TrainJob, words)
    rates = [job.schedule.rate(step, 10, job.warmup_steps, job.decay_steps) for step in range(10)]
    assert rates[:3] == [0.5, 1, 1]
    assert rates[6] == 0.25
    assert thaw(TrainJob, freeze(job)) == job
    with pytest.raises(ConfigError, match=r"schedule\.decay: is a key of schedule=wsd"):
        compose(TrainJob, [*words, "schedule.decay=2"])


class EveryOther:
    """An objective of a user's own: only every other next token is a target."""

    def num_targets(self, sizes):
        return np.asarray(sizes, np.int64) // 2

    def examples(self, tokens, sizes, numbers):
        pair = NEXT_TOKEN.examples(tokens, sizes, numbers)
        pair[1, :, 1::2] = IGNORED
        return pair


def test_an_objective_says_what_is_a_target(dataset):
    words = [f"data.path={dataset}", "train.steps=20", "schedule.warmup=0"]
    words += ["train.sequence_length=64", "objective=own"]
    typed = [*words, f"objective._target_={__name__}.EveryOther"]
    job = compose(TrainJob, typed)
    feed = feed_of(job, open_sources(job.data))
    alone, many = (collect(feed, (0, 3), 0, world, 8, 2) for world in (1, 2))
    for (one, micro, _), (_, same, _) in zip(alone, many, strict=True):
        counted = sum((m.targets != IGNORED).sum() for m in micro)
        assert 7 * 32 < one.targets == counted <= 8 * 32, "the last window of a shard is shorter"
        assert all(torch.equal(a.targets, b.targets) for a, b in zip(micro, same, strict=True))
    micro = next(validation_windows(feed.splits[0], 64, 2, objective=feed.objective))
    assert (micro.targets[0] != IGNORED).sum() == 32
    assert targets(job) == {"objective._target_": f"{__name__}.EveryOther"}
    with pytest.raises(UserError, match="trust=true"):
        thaw(TrainJob, freeze(job))
    for wrong, problem in (
        (words, r"objective\._target_"),
        ([*typed, "data.packing=best_fit"], r"data\.packing"),
        (["objective=nxt"], r"objective: 'nxt' is not one of"),
    ):
        with pytest.raises(ConfigError, match=problem):
            compose(TrainJob, wrong)


@dataclass
class HelloJob(Job):
    """A verb."""

    VERB: ClassVar[str] = "hello"

    name: str = "world"  # whom to greet


def hello(words: Sequence[str]) -> int:
    print(f"Hello, {compose(HelloJob, words).name}.")
    return 0


def test_a_verb_is_one_file_and_one_line(monkeypatch, capsys):
    file = ModuleType("forescale.verbs.hello")
    file.JOB, file.EXAMPLES, file.main = HelloJob, ("hello name=you",), hello
    monkeypatch.setitem(sys.modules, file.__name__, file)
    monkeypatch.setitem(verbs.VERBS, "hello", "Greet somebody.")
    assert cli.main(["hello", "name=you"]) == 0
    assert cli.main(["hello", "--help"]) == 0
    assert cli.main(["hello", "nmae=you"]) == 2
    assert cli.main(["--help"]) == 0
    output = capsys.readouterr()
    assert "Hello, you." in output.out
    assert "forescale hello name=you" in output.out
    assert "whom to greet" in output.out
    assert "Greet somebody." in output.out
    assert "did you mean name" in output.err
