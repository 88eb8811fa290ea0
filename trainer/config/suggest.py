"""Suggestions for a name that isn't a key or a choice."""

import difflib
from collections.abc import Iterable

# Characters of a word that are compared: of a pasted page, each name took a tenth of a second.
_COMPARED = 300


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a[:_COMPARED], b[:_COMPARED]).ratio()


def nearest_first(word: str, names: Iterable[str]) -> list[str]:
    """Return the names, the one most similar to `word` first; ties keep their order."""
    return sorted(names, key=lambda name: -_likeness(word, name))


def meant(path: str, paths: Iterable[str]) -> str | None:
    """Return the key of `paths` that an unknown key probably means, or None.

    It is another project's name of the key, a typing error in the path, or the right name in the
    wrong section.
    """
    paths, (section, _, last) = list(paths), path.rpartition(".")
    if (synonym := _SYNONYMS.get(last)) in paths:
        return synonym
    weight = 0.95 if section else 0.8  # without a dot, prefer names of sections

    def likeness(candidate: str) -> float:
        leaf = candidate.rpartition(".")[2]
        return max(_likeness(path, candidate), weight * _likeness(last, leaf))

    best = max(paths, key=likeness, default="")
    return best if best and likeness(best) >= 0.6 else None


# Names of our keys in HF Trainer, nanoGPT, GPT-NeoX, torchtitan and DeepSpeed.
_SYNONYMS = {
    **dict.fromkeys(("lr", "max_lr", "peak_lr"), "optimizer.learning_rate"),
    **dict.fromkeys(("wd", "decay_rate"), "optimizer.weight_decay"),
    **dict.fromkeys(("adam_beta1", "b1"), "optimizer.beta1"),
    **dict.fromkeys(("adam_beta2", "b2"), "optimizer.beta2"),
    **dict.fromkeys(("grad_clip", "gradient_clipping", "max_grad_norm"), "optimizer.clip"),
    **dict.fromkeys(("batch", "batch_size", "train_batch_size"), "train.global_batch"),
    **dict.fromkeys(
        ("micro_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"),
        "train.micro_batch",
    ),
    **dict.fromkeys(("max_steps", "num_steps", "iterations", "max_iters"), "train.steps"),
    **dict.fromkeys(("max_tokens", "token_budget"), "train.tokens"),
    **dict.fromkeys(("seq_len", "seq_length", "block_size", "context"), "train.sequence_length"),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim"), "model.width"),
    **dict.fromkeys(("n_layer", "n_layers", "layers", "num_hidden_layers"), "model.num_layers"),
    **dict.fromkeys(("n_head", "n_heads", "heads", "num_attention_heads"), "model.num_heads"),
    **dict.fromkeys(("n_kv_heads", "num_key_value_heads"), "model.num_kv_heads"),
    **dict.fromkeys(("d_head", "head_size", "kv_channels"), "model.head_dim"),
    **dict.fromkeys(("rope_theta", "rope_base"), "model.position.theta"),
    **dict.fromkeys(("norm_eps", "rms_norm_eps", "layer_norm_epsilon"), "model.norm.eps"),
    **dict.fromkeys(("num_experts", "num_local_experts", "moe_experts"), "model.mlp.experts"),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k"), "model.mlp.top_k"),
    **dict.fromkeys(("sliding_window", "window"), "model.mixer.window"),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim"), "model.mlp_width"),
    **dict.fromkeys(("warmup_steps", "warmup_iters", "warmup_ratio"), "schedule.warmup"),
    **dict.fromkeys(("zero_stage", "zero"), "engine.stage"),
    **dict.fromkeys(("dtype", "mixed_precision"), "precision.kind"),
    **dict.fromkeys(("save_every", "save_steps", "save_interval"), "checkpoint.every"),
    **dict.fromkeys(("eval_every", "eval_steps", "eval_interval"), "validation.every"),
    **dict.fromkeys(("log_every", "logging_steps", "log_interval"), "logging.every"),
    **dict.fromkeys(("gpus", "num_gpus", "nproc_per_node"), "launch.processes"),
}
