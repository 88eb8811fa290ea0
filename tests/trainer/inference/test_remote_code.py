"""Exports that bring their own code: transformers computes what we compute, without forescale."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from forescale.inference import remote_code
from forescale.inference.hf_directory import as_text
from forescale.models import Transformer
from tests.models.configs import changed, model_config

pytest.importorskip("transformers")

BASE = model_config(num_layers=2, width=32, num_heads=4, vocab_size=61, max_sequence_length=40)
FIRST = changed(BASE, mixer__token_shift=True, value_embedding=1, bigram_rows=101)
EXPERTS = dict(mlp__experts=5, mlp__top_k=2, mlp__expert_width=16, mlp__shared=1)
CASES = {
    "first": FIRST,
    "first-tied": changed(FIRST, num_kv_heads=2, tie_embeddings=True, mixer__value_residual=0.5),
    "window": changed(FIRST, mixer="window", mixer__window=5, mixer__global_tokens=2),
    "gates": changed(BASE, mixer__gate="channel", position__fraction=0.5, norm__placement="post"),
    "heads": changed(BASE, mixer__gate="head", head_dim=12, norm__placement="sandwich", bias=True),
    "mup": changed(FIRST, parametrization="completep", parametrization__base_width=8),
    "parallel": changed(BASE, norm__placement="parallel", mlp="gelu", norm="layernorm"),
    "positions": changed(BASE, position="none", norm="layernorm", norm__embedding=True),
    "learned": changed(
        BASE, mtp_layers=1, position="learned", norm__placement="residual", mlp="relu2"
    ),
    "shared": changed(BASE, norm__placement="shared", head__softcap=3.0, mixer__qk_norm="layer"),
    "yarn": changed(FIRST, position__scaling="yarn", position__scaling__factor=2.0),
    "latent": changed(BASE, mixer="latent", mixer__query_rank=12),
    "latent-alibi": changed(BASE, mixer="latent", position="alibi", norm__embedding=True),
    "alibi": changed(BASE, position="alibi", num_heads=4, num_kv_heads=2),
    "relative": changed(BASE, position="relative", position__distance=12, position__buckets=8),
    "sinusoidal": changed(BASE, position="sinusoidal"),
    "mingru": changed(BASE, mixer="mingru", bias=True),
    "lstm": changed(BASE, mixer="lstm"),
    "deltanet": changed(BASE, mixer="gated_deltanet"),
    "dense": changed(BASE, head="dense", bias=True),
    "pattern": changed(BASE, mixer_pattern=["gated_deltanet", "attention"]),
    "moe": changed(FIRST, mlp="moe", mlp__scores="sigmoid", mlp__bias_speed=0.1, **EXPERTS),
}
ENCODER = changed(BASE, causal=False)
ENCODERS = {
    "rotary": changed(ENCODER, head="dense", tie_embeddings=True),
    "relative": changed(ENCODER, position="relative", position__distance=12, position__buckets=8),
    "latent": changed(ENCODER, mixer="latent", position="sinusoidal", norm__placement="residual"),
    "dense": changed(ENCODER, position="learned", head="dense", bias=True, mlp="gelu_exact"),
}
# What a user does, where forescale can't be imported.
USER = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
sys.modules["forescale"] = None  # to import it is an error
got = {}
for folder in Path(sys.argv[1]).iterdir():
    encodes = folder.name.startswith("encoder-")
    auto = AutoModelForMaskedLM if encodes else AutoModelForCausalLM
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = torch.load(sys.argv[2])
    options = dict(inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        got[folder.name] = {
            "logits": model(**inputs).logits,
            "loss": model(**inputs, labels=inputs["input_ids"]).loss,
            "written": [
                model.generate(**options, num_beams=beams, use_cache=uses)
                for beams in ((1, 3) if folder.name == "first" else (1,))
                for uses in (True, False) if not encodes
            ],
        }
torch.save(got, sys.argv[3])
"""


def test_transformers_computes_the_same_where_forescale_is_absent(tmp_path):
    tokens = torch.randint(1, 61, (2, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    torch.save({"input_ids": tokens, "attention_mask": mask}, tmp_path / "inputs")
    expected, source = {}, Path(remote_code.__file__).with_name(remote_code.MODELING)
    encoders = {f"encoder-{name}": config for name, config in ENCODERS.items()}
    for name, config in (CASES | encoders).items():
        torch.manual_seed(1)
        model = Transformer(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            for buffer in model.buffers():
                buffer.add_(torch.arange(len(buffer)))
            expected[name] = model(tokens, padding_mask_BL=mask.bool())
        keys, tensors = remote_code.as_code(model.config, model.state_dict())
        (folder := tmp_path / "models" / name).mkdir(parents=True)
        (folder / "config.json").write_text(as_text(keys))
        (folder / source.name).write_bytes(source.read_bytes())
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    arguments = [str(tmp_path / name) for name in ("models", "inputs", "got")]
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", USER, *arguments]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    got = torch.load(tmp_path / "got")
    for name, logits in expected.items():
        assert logits.abs().max() > 1, name
        assert (got[name]["logits"] - logits)[mask.bool()].abs().max() < 1e-5, name
        shift = int(name not in encoders)
        rows = logits[:, : 20 - shift].flatten(0, 1), tokens[:, shift:].flatten()
        assert abs(got[name]["loss"] - torch.nn.functional.cross_entropy(*rows)) < 1e-5, name
        if name in encoders:
            continue
        cached, plain, *beams = got[name]["written"]
        assert cached.shape[1] == 28
        assert torch.equal(cached, plain), name
        assert not beams or torch.equal(*beams)
