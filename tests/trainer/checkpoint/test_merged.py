"""Checkpoints with adapters: read merged, as a model without adapters."""

import shutil
from copy import deepcopy

import pytest
import torch

from forescale import open_run
from forescale.checkpoint.average import average
from forescale.checkpoint.reader import Checkpoint
from forescale.checkpoint.writer import MergedReader
from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.engine.portable.fragments import WEIGHT, Fragment
from forescale.ground.errors import UserError
from forescale.models.adapters import adapter_of, is_adapter, stored_name
from forescale.run.directory import Parent, Run
from forescale.run.start import start
from forescale.train.model import adapting, build_model, freeze
from tests.trainer.small_run import make_dataset, make_job, make_run, save

WIDTH = ("model.num_layers=2", "model.width=32", "model.num_heads=2")
OF_EACH = (("lora", 4), ("lora", 7), ("mean", 0))
LORA = ("lora.rank=3", "lora.alpha=6", "optimizer=adamw", "run.from.load=weights")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(a run of a checkpoint with adapters that changed, its model with them)"""
    folder = tmp_path_factory.mktemp("adapted")
    data = make_dataset(folder / "data")
    origin = make_run(data, folder / "runs", "small", *WIDTH)
    words = (*WIDTH, *LORA, f"run.from.run={origin.path}", "run.from.step=8")
    started = start(make_job(data, folder / "runs", "lora", *words))
    job = thaw(TrainJob, started.run.config, False)
    model = build_model(job, started.sources.vocab_size, adapting(job, None))
    freeze(job, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    attempt = started.run.new_attempt()
    attempt.start_from(Parent(0), started.run)
    named = {stored_name(n): p for n, p in model.named_parameters()}
    save(started.run, attempt, 4, Stored(named), {"adapter_scale": job.lora.scale})
    return started.run, model.eval()


class Stored:
    def __init__(self, named):
        self.named = named

    def named_parameters(self):
        return self.named.items()


def test_the_merged_model_computes_what_the_model_with_adapters_does(adapted):
    run, model = adapted
    merged = open_run(run.path).model()
    tokens = torch.randint(0, 300, (2, 16))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens), model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", [None, (10, 32, 10)], ids=["range", "columns"])
def test_any_range_of_a_matrix_is_read_merged(adapted, cut):
    run, _ = adapted
    checkpoint = Checkpoint(run.checkpoint_path(4))
    name = "blocks.1.mixer.key.weight"
    down, up = (checkpoint.tensor(part) for part in adapter_of(name))
    whole = checkpoint.tensor(name) + 2 * up @ down
    data = torch.empty(57)
    MergedReader(checkpoint).fill(Fragment(name, (32, 32), WEIGHT, 13, data, cut))
    flat = whole.flatten() if cut is None else whole[:, 10:20].flatten()
    torch.testing.assert_close(data, flat[13:70])


def test_an_average_is_of_merged_weights(adapted, tmp_path):
    """The mean of products isn't the product of means."""
    run, model = adapted
    copy, changed = Run(shutil.copytree(run.path, tmp_path / "lora")), deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    named = {stored_name(n): p for n, p in changed.named_parameters()}
    save(copy, copy.attempts()[0], 7, Stored(named), {"adapter_scale": 2.0})
    average(copy, [4, 7], Run(tmp_path / "mean"))
    before, after, mean = (open_run(tmp_path / at).model(step) for at, step in OF_EACH)
    weights = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        expected = (weight.double() + weights[name]) / 2
        assert torch.equal(dict(mean.named_parameters())[name], expected.float()), name
    assert not any(map(is_adapter, Checkpoint(tmp_path / "mean/checkpoints/step-00000000").shapes))


def test_adapters_of_an_engine_are_left_as_they_are(adapted):
    name, data = "blocks.0.mlp.up.lora_A.weight", torch.full((8,), 7.0)
    reader = MergedReader(Checkpoint(adapted[0].checkpoint_path(4)))
    reader.fill(Fragment(name, (3, 32), WEIGHT, 0, data))
    assert data.tolist() == [7.0] * 8


def test_another_model_is_refused_by_its_merged_shapes(adapted):
    checkpoint = Checkpoint(adapted[0].checkpoint_path(4))
    plain = dict(checkpoint.weights().shapes)
    checkpoint.expect_shapes(plain, merged=True)
    with pytest.raises(UserError, match=r"lora_A\.weight is .* there and None"):
        checkpoint.expect_shapes(plain)


def test_adapters_alone_are_read_as_a_part_of_a_model(adapted, tmp_path):
    """As members of a run on several clusters send them."""
    copy = Run(shutil.copytree(adapted[0].path, tmp_path / "lora"))
    every = {stored_name(n): p for n, p in adapted[1].named_parameters()}
    named = {name: p for name, p in every.items() if is_adapter(name)}
    save(copy, copy.attempts()[0], 7, Stored(named), {})
    with pytest.raises(UserError, match="the adapter of no weight"):
        Checkpoint(copy.checkpoint_path(7))
    part = Checkpoint(copy.checkpoint_path(7), partial=True)
    assert all(torch.equal(part.tensor(name), p) for name, p in named.items())
