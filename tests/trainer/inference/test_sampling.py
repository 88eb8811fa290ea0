"""Sampling from a model that has diverged ends with a sentence, also at the end of a run."""

import pytest
import torch

from forescale.errors import UserError
from forescale.inference import summary
from forescale.inference.sampling import sampled
from forescale.models.decoding.sampler import Sampler
from forescale.run.start import start
from tests.trainer.small_run import make_job

OPTIONS = {"seed": 0, "max_context": 8}


class Constant(torch.nn.Module):
    """A model with the same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)


def test_a_model_whose_logits_are_finite_is_sampled():
    assert list(sampled(Constant([float("-inf"), 0.0]), [0], 3, Sampler(), **OPTIONS)) == [1, 1, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_is_refused_with_a_sentence(temperature):
    model = Constant([0.0, float("nan")])
    with pytest.raises(UserError, match=r"the model: can't write text .*; use an earlier checkp"):
        list(sampled(model, [0], 3, Sampler(temperature), **OPTIONS))


def test_a_run_that_has_diverged_ends_with_its_summary(small_data, tmp_path, monkeypatch, capsys):
    started = start(make_job(small_data, tmp_path / "runs", "first"))
    size = started.sources.vocab_size
    nan = Constant([float("nan")] * size)
    monkeypatch.setattr(summary.RunView, "model", lambda *_, **__: nan)
    summary.summarize(started)
    out = capsys.readouterr().out
    assert "No sample: the model: can't write text" in out
    assert "Next:" in out


@pytest.mark.parametrize("mixer", ["attention", "mingru"])
def test_the_summary_names_an_export_only_of_a_model_that_has_one(
    small_data, tmp_path, monkeypatch, capsys, mixer
):
    started = start(make_job(small_data, tmp_path / "runs", "first", f"model.mixer={mixer}"))
    model = Constant([0.0] * started.sources.vocab_size)
    monkeypatch.setattr(summary.RunView, "model", lambda *_, **__: model)
    summary.summarize(started)
    assert ("forescale export first" in capsys.readouterr().out) == (mixer == "attention")


def test_the_summary_names_what_each_objective_s_model_can_do(small_data, tmp_path, capsys):
    words = {"masked": ["model.causal=false"], "seq2seq": ["model.encoder_layers=1"]}
    for kind, more in words.items():
        sizes = ["model.num_layers=1", "model.width=32", "model.num_heads=2"]
        made = make_job(small_data, tmp_path, kind, *sizes, f"objective.kind={kind}", *more)
        summary.summarize(start(made))
    out = capsys.readouterr().out
    assert "forescale eval masked" in out
    assert "forescale generate masked" not in out
    assert 'forescale generate seq2seq prompt="def <extra_id_0>(self):"' in out
