"""What a complete run ends with: scores beside compressors, a sample, and next steps."""

import re
import shlex
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forescale.data.dataset import Dataset
from forescale.inference import summary
from forescale.inference.view import RunView
from forescale.run.start import start
from forescale.verbs.generate import main as generate
from tests.trainer.data.prepare.test_builder import texts_of
from tests.trainer.inference.test_generation import Constant
from tests.trainer.small_run import make_job


def test_a_run_that_has_diverged_ends_with_its_summary(small_data, tmp_path, monkeypatch, capsys):
    started = start(make_job(small_data, tmp_path / "runs", "first"))
    size = started.sources.vocab_size
    nan = Constant([float("nan")] * size)
    monkeypatch.setattr(RunView, "checkpoint", lambda *_: None)
    monkeypatch.setattr(RunView, "load", lambda *_, **__: nan)
    summary.summarize(started, generate)
    out = capsys.readouterr().out
    assert "No sample: the model: can't write text" in out
    assert "Next:" in out


def test_the_sample_is_what_generate_writes(own_run, small_data, forescale, capsys):
    """It begins with words of a held-out document, of whatever kind the text is."""
    started = start(RunView(own_run).config)
    summary.summarize(started, generate)
    out = capsys.readouterr().out
    command = re.search("A sample, as `(forescale .*)` writes it:", out)[1]
    assert command in out.partition("Next:")[2]
    _, *words = shlex.split(command)
    assert words[:2] == ["generate", str(started.run.path)]
    prompt = words[2].removeprefix("prompt=")
    assert prompt
    assert any(text.startswith(prompt) for text in texts_of(small_data, "validation"))
    assert forescale.prints(*words) in out
    assert "PPMd, given" in out
    scores = dict(re.findall(r"^  (.+?)  +(\d\.\d{4})", out, re.MULTILINE))
    best = re.search("Fewest bits: (.*)[.]", out)[1]
    assert scores[best] == min(scores.values())
    xz = Dataset(small_data).manifest["baselines"]["xz"]["bits_per_byte"]
    assert float(scores["xz"]) == pytest.approx(xz, abs=1e-4)


def test_a_prompt_holds_no_reference_of_a_command():
    """Words with `${`, as scripts and templates have them, would name another key."""
    split = SimpleNamespace(
        shard_tokens=[9], document_ends=lambda *_: [9], read=lambda *_: np.zeros(1)
    )
    tokenizer = SimpleNamespace(decode=lambda *_, **__: "echo from ${HOME} and on\n")
    dataset: Any = SimpleNamespace(split=lambda name: split, tokenizer=tokenizer)
    assert summary.first_words(dataset) == "echo from"


def test_the_summary_names_an_export_only_of_a_model_that_has_one(small_data, tmp_path, capsys):
    keys = ["model.num_layers=1", "model.encoder_layers=1", "objective=seq2seq"]
    keys += ["model.width=32", "model.num_heads=2", "model.mlp=geglu"]
    keys += ["model.mixer.qk_norm=none", "model.tie_embeddings=true", "model.bias=false"]
    for position in ("relative", "rotary"):  # T5 has the first alone
        words = [*keys, f"model.position={position}"]
        started = start(make_job(small_data, tmp_path / "runs", position, *words))
        summary.summarize(started, lambda words: 0)
        out = capsys.readouterr().out
        assert ("forescale export " in out) == (position == "relative")


def test_the_summary_names_what_each_objective_s_model_can_do(small_data, tmp_path, capsys):
    words = {"masked": ["model.causal=false"], "seq2seq": ["model.encoder_layers=1"]}
    for kind, keys in words.items():
        sizes = ["model.num_layers=1", "model.width=32", "model.num_heads=2"]
        job = make_job(small_data, tmp_path, kind, *sizes, f"objective={kind}", *keys)
        summary.summarize(start(job), generate)
    out = capsys.readouterr().out
    assert f"forescale eval {tmp_path}/masked" in out
    assert f"forescale generate {tmp_path}/masked" not in out
    first = summary.first_words(Dataset(small_data)).split()[0]
    assert f"forescale generate {tmp_path}/seq2seq 'prompt={first} <extra_id_0>" in out
