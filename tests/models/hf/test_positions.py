"""Rotary positions in Hugging Face's config.json: what is written, read, and refused."""

import pytest
import torch

from forescale.models import Transformer
from forescale.models.hf import from_hf, to_hf
from forescale.models.hf.config_json import positions_from_hf, positions_to_hf
from forescale.models.positions.rope_scaling import frequencies, ntk_theta
from tests.models.configs import changed, model_config

CONFIG = model_config(num_layers=1, width=32, num_heads=2, vocab_size=50, max_sequence_length=4096)
YARN = changed(CONFIG, position__scaling="yarn", position__scaling__factor=4.0)
NTK = changed(CONFIG, position__scaling="ntk", position__scaling__factor=4.0)


def test_yarn_is_written_for_transformers_4_and_5():
    keys = positions_to_hf(YARN)
    assert keys["max_position_embeddings"] == 4096
    assert keys["rope_scaling"]["rope_type"] == "yarn"
    assert keys["rope_scaling"]["factor"] == 4.0
    assert keys["rope_scaling"]["original_max_position_embeddings"] == 1024
    assert keys["rope_parameters"] == keys["rope_scaling"] | {"rope_theta": 10_000.0}
    assert positions_to_hf(CONFIG)["rope_scaling"] is None


@pytest.mark.parametrize(
    "config", [YARN, changed(YARN, position__scaling__original_length=2048), NTK]
)
def test_what_is_read_has_the_frequencies_of_what_was_written(config):
    back = changed(CONFIG, **positions_from_hf(positions_to_hf(config)))
    (local, length), (peer, other) = (frequencies(c, torch.device("cpu")) for c in (back, config))
    torch.testing.assert_close(local, peer)
    assert length == other


def test_lengths_agree_with_the_factor_whatever_was_trained():
    """transformers 4 divides the longest by the original length, and takes no other factor."""
    keys = positions_to_hf(changed(YARN, position__scaling__original_length=2048))
    assert keys["max_position_embeddings"] == 4.0 * 2048


def test_ntk_is_written_as_a_larger_base():
    keys = positions_to_hf(NTK)
    assert keys["rope_theta"] == ntk_theta(NTK) > 40_000
    assert keys["rope_parameters"] == {"rope_type": "default", "rope_theta": ntk_theta(NTK)}


def test_ntk_computes_the_same_in_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    local = Transformer(changed(NTK, mixer__qk_norm="none")).eval()
    keys, tensors = to_hf(local.config, local.state_dict())
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(keys)).eval()
    peer.load_state_dict(dict(tensors))
    tokens = torch.randint(0, 50, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (peer(tokens).logits - local(tokens)).abs().max() < 1e-5


def test_lengths_that_are_not_whole_are_refused():
    with pytest.raises(ValueError, match=r"whole lengths.*give model\..*original_length"):
        positions_to_hf(changed(YARN, position__scaling__factor=3.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention_factor", 2.0), ("beta_fast", 16), ("truncate", False), ("mscale", 0.7)],
)
def test_another_yarn_is_refused_by_its_key(key, value):
    keys, tensors = to_hf(YARN, Transformer(YARN).state_dict())
    keys["rope_parameters"] = keys["rope_parameters"] | {key: value}
    with pytest.raises(ValueError, match=rf"rope_parameters\.{key}"):
        from_hf(keys, dict(tensors))


def test_the_published_recipe_of_qwen3_is_read():
    """Its longest length isn't the factor times the original; the factor counts."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    got = positions_from_hf({"max_position_embeddings": 40960, "rope_scaling": rope})
    scaling = got["position"]["scaling"]
    assert scaling["factor"] == 4.0
    assert scaling["original_length"] == 32768
