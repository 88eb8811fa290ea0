"""What a complete run ends with: a sample, also of a model that has diverged, and next steps."""

import pytest

from forescale.inference import summary
from forescale.run.start import start
from tests.trainer.inference.test_generation import Constant
from tests.trainer.small_run import make_job


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
    for kind, keys in words.items():
        sizes = ["model.num_layers=1", "model.width=32", "model.num_heads=2"]
        job = make_job(small_data, tmp_path, kind, *sizes, f"objective={kind}", *keys)
        summary.summarize(start(job))
    out = capsys.readouterr().out
    assert "forescale eval masked" in out
    assert "forescale generate masked" not in out
    assert 'forescale generate seq2seq prompt="def <extra_id_0>(self):"' in out
