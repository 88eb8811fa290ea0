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
_NAMES = {
    "optimizer.learning_rate": "lr learning_rate max_lr peak_lr",
    "optimizer.momentum": "momentum",
    "optimizer.weight_decay": "wd decay_rate",
    "optimizer.beta1": "adam_beta1 b1",
    "optimizer.beta2": "adam_beta2 b2",
    "optimizer.clip": "grad_clip gradient_clipping max_grad_norm",
    "train.global_batch": "batch batch_size train_batch_size",
    "train.micro_batch": "micro_batch_size per_device_train_batch_size gradient_accumulation_steps",
    "train.steps": "max_steps num_steps iterations max_iters",
    "train.tokens": "max_tokens token_budget",
    "train.sequence_length": "seq_len seq_length block_size context",
    "model.width": "hidden_size d_model n_embd dim",
    "model.num_layers": "n_layer n_layers layers num_hidden_layers",
    "model.num_heads": "n_head n_heads heads num_attention_heads",
    "model.num_kv_heads": "n_kv_heads num_key_value_heads",
    "model.head_dim": "d_head head_size kv_channels",
    "model.position.theta": "rope_theta rope_base",
    "model.norm.eps": "norm_eps rms_norm_eps layer_norm_epsilon",
    "model.mlp.experts": "num_experts num_local_experts moe_experts",
    "model.mlp.top_k": "num_experts_per_tok moe_top_k",
    "model.mixer.window": "sliding_window window",
    "model.mlp_width": "intermediate_size d_ff ffn_dim",
    "schedule.warmup": "warmup_steps warmup_iters warmup_ratio",
    "engine.stage": "zero_stage zero",
    "precision.kind": "dtype mixed_precision",
    "checkpoint.every": "save_every save_steps save_interval",
    "validation.every": "eval_every eval_steps eval_interval",
    "logging.every": "log_every logging_steps log_interval",
    "launch.processes": "gpus num_gpus nproc_per_node",
}
_SYNONYMS = {name: key for key, names in _NAMES.items() for name in names.split()}
