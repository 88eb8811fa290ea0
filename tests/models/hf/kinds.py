"""Tiny models of families of transformers, each of another kind."""

from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
SMALL |= dict(intermediate_size=48, max_position_embeddings=64, initializer_range=0.2)
SMALL |= dict(vocab_size=300, bos_token_id=0, eos_token_id=0, pad_token_id=1)
GROUPED = SMALL | dict(num_key_value_heads=1)
EXPERTS = GROUPED | dict(num_experts_per_tok=2)
LATENT = dict(kv_lora_rank=16, q_lora_rank=16, v_head_dim=8)
LATENT |= dict(qk_rope_head_dim=8, qk_nope_head_dim=8)

# By model_type.
KINDS: dict[str, dict[str, Any]] = {
    "mistral": GROUPED | dict(sliding_window=8),  # a window of attention
    "phi": GROUPED,  # mixer and MLP in parallel
    "falcon": SMALL | dict(alibi=False),  # one head of keys and values
    "gpt_neox": SMALL,
    "gpt2": dict(n_embd=32, n_layer=2, n_head=2, n_positions=64)  # learned positions
    | dict(vocab_size=300, bos_token_id=0, eos_token_id=0, initializer_range=0.2),
    "bloom": SMALL | dict(n_layer=2, n_head=2),  # ALiBi, tied
    "opt": SMALL | dict(ffn_dim=48, word_embed_proj_dim=32),  # positions of its mask
    "gemma2": GROUPED | dict(head_dim=16, sliding_window=8),  # softcaps
    "olmoe": EXPERTS | dict(num_experts=4, output_router_logits=True),  # experts with a penalty
    "gpt_oss": EXPERTS | dict(head_dim=16, num_local_experts=4, sliding_window=8),  # sinks
    "deepseek_v3": EXPERTS  # latent attention, biases of experts in a buffer
    | LATENT
    | dict(num_key_value_heads=2, moe_intermediate_size=16, n_routed_experts=4)
    | dict(n_group=2, topk_group=1, first_k_dense_replace=1, n_shared_experts=1),
    "qwen3_next": EXPERTS  # linear attention
    | dict(head_dim=16, num_experts=4, moe_intermediate_size=16)
    | dict(shared_expert_intermediate_size=16, linear_num_key_heads=2)
    | dict(linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
    | dict(layer_types=["linear_attention", "full_attention"]),
    "mamba": SMALL | dict(state_size=4, time_step_rank=4),  # a recurrence
    "recurrent_gemma": GROUPED  # both, with a state in its modules
    | dict(num_hidden_layers=3, lru_width=32, attention_window_size=8)
    | dict(block_types=["recurrent", "recurrent", "attention"]),
    "bert": SMALL,  # of masked tokens
    # An encoder and a decoder, with relative and with learned positions.
    "t5": dict(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=300)
    | dict(feed_forward_proj="gated-gelu", decoder_start_token_id=0, initializer_factor=4.0),
    "bart": dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2)
    | dict(decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=300)
    | dict(max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=0)
    | dict(forced_eos_token_id=None, init_std=0.2, decoder_start_token_id=0, dropout=0.0),
}
TWO_PARTS = ("t5", "bart")


def config_of(kind: str, **changes: Any) -> Any:
    """The library's config of a kind."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**(KINDS[kind] | changes))


def save_config(kind: str, folder: Path, **changes: Any) -> Path:
    """Write a directory with the config.json of a kind, without weights."""
    config_of(kind, **changes).save_pretrained(folder)
    return folder


def save_model(kind: str, folder: Path, seed: int = 1, **changes: Any) -> Any:
    """Write a directory with a model of a kind, and return the model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    torch.manual_seed(seed)
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    auto = AutoModelForSeq2SeqLM if kind in TWO_PARTS else auto
    model = auto.from_config(config_of(kind, **changes)).eval()
    model.save_pretrained(folder)
    return model
