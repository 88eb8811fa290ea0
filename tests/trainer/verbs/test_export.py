"""`forescale export`: transformers computes what we compute. (Each family: models/hf.)"""

import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forescale import open_run
from forescale.checkpoint.reader import Checkpoint
from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.inference.question import question_of
from forescale.models import hf
from forescale.run.start import start
from forescale.train.model import build_model
from tests.trainer.small_run import make_job, make_run

transformers = pytest.importorskip("transformers")

BASE = ["model.num_layers=2", "model.width=32", "model.num_heads=2"]
SWIGLU = ["model.mlp=swiglu", "model.mixer.qk_norm=none", "model.num_kv_heads=1"]
GPT2 = ["model.position=learned", "model.norm=layernorm", "model.mlp=gelu", "model.bias=true"]
QWEN3 = ["model.mlp=swiglu", "model.mixer.qk_norm=head", "model.tie_embeddings=true"]
FAMILIES = {
    "Qwen3ForCausalLM": QWEN3,
    "GPT2LMHeadModel": [*GPT2, "model.mixer.qk_norm=none", "model.tie_embeddings=true"],
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_large_model_is_written_in_parts_and_never_held_whole(
    architecture, small_data, tmp_path, monkeypatch, forescale
):
    deep = ["model.num_layers=9", *BASE[1:], *FAMILIES[architecture]]
    run = make_run(small_data, tmp_path / "runs", "a", *deep)
    held, most = [0], [0]
    read = Checkpoint.tensor

    def counted(self, name, state="weight"):
        tensor = read(self, name, state)
        held[0] += tensor.nbytes
        most[0] = max(most[0], held[0])
        weakref.finalize(tensor, lambda size: held.__setitem__(0, held[0] - size), tensor.nbytes)
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    monkeypatch.setattr("forescale.inference.export._PART", 20_000)
    assert forescale("export", run.path, f"to={tmp_path / 'hf'}")[0] == 0
    parts = sorted(p.name for p in (tmp_path / "hf").glob("model-*.safetensors"))
    assert parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    assert len(parts) > 3
    monkeypatch.undo()
    sizes = [4 * torch.Size(s).numel() for s in open_run(run.path).checkpoint().shapes.values()]
    assert most[0] < 20_000 + 3 * max(sizes) < sum(sizes) / 2
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(hf_model).__name__ == architecture
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = open_run(run.path).model()(tokens), hf_model.eval()(tokens).logits
    assert (logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_rounded_to_the_format_that_is_asked(
    dtype, kind, small_data, tmp_path, monkeypatch, forescale
):
    """Of a model in parts, whose multipliers are in its weights: rounded after that, once."""
    mup = [
        "model.parametrization=mup",
        "model.parametrization.base_width=12",
        *("model.norm.placement=sandwich", "model.mlp=geglu", "model.scale_embedding=true"),
        *("model.tie_embeddings=true", "model.head.softcap=30"),
    ]
    run = make_run(small_data, tmp_path / "runs", "a", *BASE, *mup)
    monkeypatch.setattr("forescale.inference.export._PART", 20_000)
    assert forescale("export", run.path, f"to={tmp_path / 'full'}")[0] == 0
    out = forescale.prints("export", run.path, f"to={tmp_path / 'hf'}", f"dtype={dtype}")
    assert f"MiB, {dtype})" in out
    full, exported = ({}, {})
    for weights, folder in ((full, "full"), (exported, "hf")):
        for path in (tmp_path / folder).glob("model-*.safetensors"):
            weights |= load_file(path)
    assert exported.keys() == full.keys()
    assert all(torch.equal(exported[name], full[name].to(kind)) for name in full)
    assert any((exported[name] != full[name]).any() for name in full)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in full.values())
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert hf_model.dtype == hf_model.config.dtype == kind
    assert {p.dtype for p in hf_model.parameters()} == {kind}
    assert all(torch.equal(hf_model.state_dict()[name], exported[name]) for name in exported)


def test_a_weight_beyond_the_range_of_the_format_is_refused(
    small_data, tmp_path, monkeypatch, forescale
):
    """All are near 40,000 at step 4 and near 80,000 at step 8; fp16 ends at 65,504."""
    monkeypatch.setattr("tests.trainer.small_run.SHIFT", 10_000)
    run = make_run(small_data, tmp_path / "runs", "a", *BASE, *SWIGLU)
    command = ("export", run.path, f"to={tmp_path / 'hf'}")
    err = forescale.refuses(*command, "dtype=fp16")
    assert "dtype: fp16 holds numbers up to 65504, and model.embed_tokens.weight has one of " in err
    assert err.endswith("; give dtype=bf16.\n")
    assert not (tmp_path / "hf").exists()
    assert forescale(*command, "dtype=bf16")[0] == 0
    assert forescale(*command[:2], f"to={tmp_path / 'early'}", "step=4", "dtype=fp16")[0] == 0
    weights = load_file(tmp_path / "early/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_the_tokenizer_goes_with_it_and_the_model_writes(trained, tmp_path, forescale):
    assert forescale("export", trained.path, f"to={tmp_path / 'hf'}")[0] == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    run_tokenizer = open_run(trained.path).tokenizer
    for text in ("def main(x):\n    return  'naïve' , x", "数据 🙂", "  a ' s n't"):
        assert tokenizer(text)["input_ids"] == run_tokenizer.encode(text).ids
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    end = open_run(trained.path).identity["dataset"]["end_of_text"]
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == end
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = tokenizer("def ", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] > prompt["input_ids"].shape[1]


def test_the_default_place_is_named_by_run_and_step(own_run, forescale):
    assert forescale("export", "small", "step=4")[0] == 0
    config = json.loads(Path("exports/small-4/config.json").read_text())
    assert config["model_type"] == "apertus"
    assert "already exists" in forescale.refuses("export", "small", "step=4")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_an_export_follows_the_umask(own_run, forescale, mask):
    """Although nobody but its owner may enter the run."""
    own_run.path.chmod(0o700)
    before = os.umask(mask)
    try:
        assert forescale("export", "small")[0] == 0
    finally:
        os.umask(before)
    (config,) = Path().rglob("exports/*/config.json")
    assert config.stat().st_mode & 0o777 == 0o666 & ~mask
    assert config.parent.stat().st_mode & 0o777 == 0o777 & ~mask


def test_the_model_that_trains_by_default_can_leave():
    assert hf.family_of(compose(TrainJob).model.resolved(4096, 256)) in hf.FAMILIES


SHARED = [*BASE, "model.mixer.qk_norm=none", "model.tie_embeddings=true"]
TWO_SIDED = {
    "BertForMaskedLM": [
        *(*SHARED, "objective=masked", "model.causal=false", "model.head=dense", "model.bias=true"),
        *("model.norm=layernorm", "model.norm.placement=residual", "model.norm.embedding=true"),
        *("model.position=learned", "model.mlp=gelu_exact"),
    ],
    "T5ForConditionalGeneration": [
        *(*SHARED, "objective=seq2seq", "model.encoder_layers=1", "model.position=relative"),
        *("model.mlp=geglu", "model.bias=false"),
    ],
}


@pytest.mark.parametrize("architecture", TWO_SIDED)
def test_an_encoder_goes_out_as_bert_or_t5(architecture, small_data, tmp_path, forescale):
    run = make_run(small_data, tmp_path / "runs", "a", *TWO_SIDED[architecture])
    out = forescale.prints("export", run.path, f"to={tmp_path / 'hf'}")
    auto = "AutoModelForMaskedLM" if architecture[0] == "B" else "AutoModelForSeq2SeqLM"
    assert f"as {architecture}" in out
    assert f"{auto}.from_pretrained" in out
    peer = getattr(transformers, auto).from_pretrained(tmp_path / "hf").eval()
    assert type(peer).__name__ == architecture
    view = open_run(run.path)
    model = view.model()
    x = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    split = model.config.source_length if architecture[0] == "T" else 0
    words = {"input_ids": x}
    if split:
        words = {"input_ids": x[:, :split], "decoder_input_ids": x[:, split:]}
    with torch.no_grad():
        assert (model(x) - peer(**words).logits).abs().max() < 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    known = view.identity["dataset"]["vocab_size"]
    if not split:
        assert tokenizer.mask_token_id == known
        fill = transformers.pipeline("fill-mask", model=peer, tokenizer=tokenizer)
        ids = torch.tensor([[*tokenizer("def main(").input_ids, known]])
        with torch.no_grad():
            best = model(ids)[0, -1].topk(3).indices.tolist()
        assert [one["token"] for one in fill("def main(<mask>", top_k=3)] == best
    if split:
        assert tokenizer("def <extra_id_0>a<extra_id_1>").input_ids[-1] == known + 1
        begun = question_of(view, "def main(<extra_id_0>").start
        assert [peer.generation_config.decoder_start_token_id] == begun
    assert "as GGUF" in forescale.refuses("export", run.path, "format=gguf")
    words = [word for word in TWO_SIDED[architecture] if word.startswith("objective")]
    words += ["model=transformers", f"model.name={tmp_path / 'hf'}"]
    back = start(make_job(small_data, tmp_path / "runs", "back", *words))
    again = build_model(back.job, known)
    with torch.no_grad():
        assert (again.eval()(x) - model(x)).abs().max() < 1e-5


def test_an_encoder_decoder_of_other_parts_is_refused_with_the_keys_in_the_way(
    small_data, tmp_path, forescale
):
    words = [*TWO_SIDED["T5ForConditionalGeneration"], "model.position=rotary"]
    run = make_run(small_data, tmp_path / "runs", "a", *words)
    err = forescale.refuses("export", run.path, f"to={tmp_path / 'hf'}")
    assert "T5ForConditionalGeneration, has position=relative (not rotary)" in err
    assert "has no encoder-decoder" in err
    assert not (tmp_path / "hf").exists()


def test_a_model_of_no_architecture_brings_its_code(small_data, tmp_path, forescale):
    """As the first run does; its adapters alone would have no module to go to."""
    run = make_run(small_data, tmp_path / "runs", "a", *BASE, "model.mixer.token_shift=true")
    out = forescale.prints("export", run.path, f"to={tmp_path / 'hf'}", "dtype=bf16")
    assert "as ForescaleForCausalLM" in out
    assert "trust_remote_code=True" in out
    assert (tmp_path / "hf/modeling_forescale.py").is_file()
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    weights = load_file(tmp_path / "hf/model.safetensors")
    local = open_run(run.path).model().state_dict()
    assert weights.keys() == local.keys()
    assert all(torch.equal(weights[n], t.to(torch.bfloat16)) for n, t in local.items())
    assert "own code" in forescale.refuses("export", run.path, "adapter=true")


def test_a_class_of_the_users_own_is_refused(small_data, tmp_path, forescale):
    custom = ["model._target_=tests.trainer.inference.test_view.Tied", "model.width=16"]
    run = make_run(small_data, tmp_path / "runs", "own", *custom)
    assert "test_view.Tied" in forescale.refuses("export", run.path)
    assert "parts are not known" in forescale.refuses("inspect", run.path, "text=def main")


def test_nothing_half_written_stays(own_run, forescale, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "exports")

    monkeypatch.setattr("forescale.inference.export.save_file", full)
    assert "the disk is full" in forescale.refuses("export", "small")
    assert not any(p.is_file() for p in own_run.path.parent.parent.glob("exports/**/*"))


def test_a_run_without_a_checkpoint_is_said(own_run, forescale):
    shutil.rmtree(own_run.checkpoints)
    assert "no checkpoint yet" in forescale.refuses("export", "small")
