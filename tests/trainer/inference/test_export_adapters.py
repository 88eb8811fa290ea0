"""Exports of a run with adapters: merged for transformers, and alone for peft; both compute what
the run's model does."""

import pytest
import torch
from safetensors.torch import load_file

from forescale import open_run
from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.models.adapters import stored_name
from forescale.run.directory import Parent
from forescale.run.start import start
from forescale.train.model import adapting, build_model, freeze
from tests.models.hf.kinds import save_config
from tests.trainer.small_run import make_dataset, make_job, make_run, save

LLAMA = ("model.num_layers=2", "model.width=32", "model.num_heads=2", "model.num_kv_heads=1")
LLAMA += ("model.mixer.qk_norm=none",)
MUP = (*LLAMA, "model.parametrization=mup", "model.parametrization.base_width=16")
GPT2 = ("model.num_layers=2", "model.width=32", "model.num_heads=2", "model.position=learned")
GPT2 += ("model.norm=layernorm", "model.bias=true", "model.mlp=gelu", "model.tie_embeddings=true")
GPT2 += ("model.mixer.qk_norm=none",)
CLASS = ("model=transformers", "model.name=mistral")


class Stored:
    def __init__(self, named):
        self.named = named

    def named_parameters(self):
        return self.named.items()


def make(folder, model, *lora):
    """Return (the run with adapters, its model with them, the run that it began with)."""
    data = make_dataset(folder / "data")
    origin = make_run(data, folder / "runs", "base", *model)
    words = (*model, *lora, "optimizer=adamw", "run.from.load=weights", "run.from.step=8")
    job = make_job(data, folder / "runs", "lora", *words, f"run.from.run={origin.path}")
    started = start(job)
    job = thaw(TrainJob, started.run.config, False)
    module = build_model(job, started.sources.vocab_size, adapting(job, None))
    freeze(job, module)
    base, draws = dict(open_run(origin.path).model().named_parameters()), torch.Generator()
    named = {stored_name(n): p for n, p in module.named_parameters()}
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(base[name] if name in base else 0.1 * torch.randn(p.shape, generator=draws))
    attempt = started.run.new_attempt()
    attempt.start_from(Parent(0), started.run)
    save(started.run, attempt, 4, Stored(named), {"adapter_scale": job.lora.scale})
    return started.run, module.eval(), origin


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        (LLAMA, ("lora.rank=3",)),
        (MUP, ("lora.rank=2", "lora.alpha=4")),
        (GPT2, ("lora.rank=3", "lora.targets=[query,value,mlp]")),
        (GPT2, ("lora.rank=2", "lora.targets=[query,key]")),
        (CLASS, ("lora.rank=3",)),
        (CLASS, ("lora.rank=2", "lora.targets=[q_proj,mlp]")),
    ],
    ids=["llama", "mup", "gpt2-some", "gpt2-attention", "class", "class-some"],
)
def test_transformers_and_peft_compute_what_the_run_does(
    tmp_path, forescale, monkeypatch, model, lora
):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    if model is CLASS:
        monkeypatch.chdir(tmp_path)
        save_config("mistral", tmp_path / "mistral")
    run, trained, origin = make(tmp_path, model, *lora)
    whole, base, alone = (tmp_path / name for name in ("whole", "base", "alone"))
    assert forescale("export", run.path, f"to={whole}")[0] == 0
    assert forescale("export", origin.path, f"to={base}")[0] == 0
    words = ("export", run.path, "adapter=true", f"to={alone}", f"base={base}")
    assert f"forescale export {origin.path} step=8 to={base}" in forescale.prints(*words)
    tokens, auto = torch.arange(3, 27)[None], transformers.AutoModelForCausalLM
    with torch.no_grad():
        expected = trained(tokens)
        assert (auto.from_pretrained(base)(tokens).logits - expected).abs().max() > 0.01
        merged = auto.from_pretrained(whole)(tokens).logits
        torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
        beside = peft.PeftModel.from_pretrained(auto.from_pretrained(base), alone)
        torch.testing.assert_close(beside(tokens).logits, expected, atol=1e-5, rtol=1e-5)


def test_half_precision_rounds_what_is_merged_and_adapters_alone(tmp_path, forescale):
    """peft computes with adapters in fp32 also beside a model in bf16."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    run, _, origin = make(tmp_path, LLAMA, "lora.rank=3")

    def exported(name, of, *words):
        out = forescale.prints("export", of.path, f"to={tmp_path / name}", *words)
        (file,) = (tmp_path / name).glob("*.safetensors")
        return load_file(file), out

    half = "dtype=bf16"
    for words in ((), ("adapter=true",)):
        full, _ = exported(f"full{len(words)}", run, *words)
        rounded, out = exported(f"half{len(words)}", run, *words, half)
        assert all(torch.equal(rounded[name], full[name].bfloat16()) for name in full)
    assert f"step=8 to=exports/base-8 {half}\n" in out
    exported("base", origin, half)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    beside = peft.PeftModel.from_pretrained(base, tmp_path / "half1")
    params = {name.replace(".default", ""): p for name, p in beside.named_parameters()}
    assert all(torch.equal(params[name], rounded[name].float()) for name in rounded)
    assert {p.dtype for name, p in params.items() if name in rounded} == {torch.float32}
    assert {p.dtype for name, p in params.items() if name not in rounded} == {torch.bfloat16}


def test_what_has_no_adapters_is_a_sentence(tmp_path, forescale):
    run = make_run(make_dataset(tmp_path / "data"), tmp_path / "runs", "base", *LLAMA)
    err = forescale.refuses("export", run.path, "adapter=true", f"to={tmp_path / 'there'}")
    assert "adapter: base was trained without adapters; leave adapter out" in err
    assert forescale("export", run.path, "base=there")[0] == 2
