"""Models that transformers' own classes make and save: their logits after the import, with a cache
too, and after the export."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from forescale.models import Transformer
from forescale.models.hf import from_hf, to_hf

transformers = pytest.importorskip("transformers")

SMALL = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=61)
SMALL |= dict(max_position_embeddings=64, initializer_range=0.2)
SMALL |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
GROUPED = SMALL | dict(num_key_value_heads=2)
FOUR = GROUPED | dict(num_hidden_layers=4)
SIX = GROUPED | dict(num_hidden_layers=6)
EXPERTS = GROUPED | dict(num_hidden_layers=2, num_experts=6, num_experts_per_tok=2)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "Mistral": FOUR | dict(sliding_window=None),
    "Mistral-window": FOUR | dict(sliding_window=5),
    "SmolLM3": FOUR,
    "SmolLM3-pattern": FOUR | dict(no_rope_layers=[0, 1, 1, 0], tie_word_embeddings=False),
    "GPTNeoX": SMALL | dict(num_hidden_layers=2),
    "GPTNeoX-in-turn": SMALL | dict(num_hidden_layers=2, use_parallel_residual=False),
    "Phi": FOUR,
    "Olmo": FOUR,
    "Olmo3": FOUR | dict(sliding_window=5),
    "Olmo3-yarn": FOUR | dict(sliding_window=5, rope_theta=500_000.0, rope_scaling=YARN),
    "Olmoe": EXPERTS,
    "Gemma": GROUPED | dict(num_hidden_layers=2, head_dim=12),
    "Gemma3Text": SIX | dict(head_dim=8, sliding_window=5),
    "Gemma3Text-scaled": SIX
    | dict(head_dim=8, query_pre_attn_scalar=14, sliding_window=5, final_logit_softcapping=3.0)
    | dict(rope_scaling={"rope_type": "linear", "factor": 8.0}),
}


def saved(name, folder):
    """A model of a small config of the class, scrambled, and what it saves."""
    kind = getattr(transformers, f"{name.partition('-')[0]}Config")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        kind(**CASES[name]), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_logits_survive_import_and_export(name, tmp_path):
    peer, config = saved(name, tmp_path / "theirs")
    model_config, state = from_hf(config, load_file(tmp_path / "theirs/model.safetensors"))
    local = Transformer(model_config).eval()
    local.load_state_dict(state)
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, logits, cache = peer(tokens).logits, local(tokens), local.new_cache()
        assert expected.abs().max() > 1
        assert (logits - expected).abs().max() < 1e-5
        parts = [local(part, cache=cache) for part in tokens.split([9, 1, 1, 6, 7], 1)]
        assert (torch.cat(parts, 1) - expected).abs().max() < 1e-5
    exported, tensors = to_hf(local.config, local.state_dict(), config["model_type"])
    assert exported["model_type"] == config["model_type"]
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/config.json").write_text(json.dumps(exported))
    save_file(dict(tensors), tmp_path / "ours/model.safetensors", metadata={"format": "pt"})
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert (again.eval()(tokens).logits - expected).abs().max() < 1e-5
