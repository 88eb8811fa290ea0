"""Write a model as one GGUF file, for llama.cpp and programs like it: the inverse of gguf_file.py.

Invariant: what is written is what llama.cpp's own conversion (convert_hf_to_gguf.py) would write of
the exported directory. What the format can't say (another architecture, another split of texts) is
refused, not left out.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from forescale.ground.errors import UserError
from forescale.inference.gguf_file import (
    ARCHITECTURES,
    INNER,
    OUTER,
    ROPE,
    SPLITS,
    llama3_divisors,
    package_of,
)
from forescale.inference.hf_directory import CONFIG, TEMPLATE
from forescale.run.finetune import default_template

FORMATS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "q8_0": "Q8_0"}
# Of model types: an architecture of llama.cpp that computes the same.
_SAME = {"mistral": "llama", **{name: name for name in ARCHITECTURES}}
_TODO = "leave format out: export then writes a directory"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # kinds of tokens
_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}


def architecture_of(config: dict[str, Any]) -> str:
    """Return llama.cpp's architecture of a config.json. Raises UserError if none computes it."""
    name = config["model_type"]
    windows = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if name not in _SAME or (windows and name in _SAME):
        problem = f"only {', '.join(_SAME)} can be written as GGUF, without sliding windows"
        problem += f", and this model is {name}" + (
            f" with windows of {windows}" if windows else ""
        )
        raise UserError("format", problem, _TODO)
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    if name == "qwen2" and head * heads != config["hidden_size"]:
        problem = f"the heads of llama.cpp's qwen2 have {config['hidden_size']:,} columns in all"
        raise UserError("format", f"{problem}, and this model's {head * heads:,}", _TODO)
    if config["rope_parameters"]["rope_type"] == "llama3" and _SAME[name] != "llama":
        raise UserError("format", f"llama.cpp's {name} has no rotary positions of llama3", _TODO)
    return _SAME[name]


def write_gguf(
    path: Path, name: str, files: dict[str, Any], tokenizer: Tokenizer,
    tensors: Callable[[], Iterable[tuple[str, Tensor]]], dtype: str,
) -> None:  # fmt: skip
    """Write the file. name: of the model; files: contents of the files beside the weights, by name;
    tensors: gives the weights by their names in transformers, and is called twice, as only one of
    them is in memory at a time; dtype: a key of FORMATS, of all matrices."""
    gguf = package_of(path)
    config = files[CONFIG]
    architecture, kind = architecture_of(config), FORMATS[dtype]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    config = config | {"head_dim": head}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    for key, here in _SIZES.items():
        writer.add_uint32(f"{architecture}.{key}", config[here])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"])
    divisors = _add_rope(writer, config)
    raw = files.get(TEMPLATE) or files["tokenizer_config.json"].get("chat_template")
    for key, value in vocabulary(tokenizer, config, default_template(raw)).items():
        form = gguf.GGUFValueType.get_type(value)
        if isinstance(value, int) and not isinstance(value, bool):
            form = gguf.GGUFValueType.UINT32
        writer.add_key_value(f"tokenizer.{key}", value, form)

    def stored() -> Iterator[tuple[str, np.ndarray, Any]]:
        if divisors is not None:
            yield ROPE, divisors, gguf.GGMLQuantizationType.F32
        for name, tensor in tensors():
            values = _ordered(name, tensor.float().numpy(), architecture, config)
            is_matrix = values.ndim > 1 and values.shape[-1] % 32 == 0  # of whole blocks of Q8_0
            short = kind if values.ndim > 1 and (is_matrix or kind != "Q8_0") else "F32"
            form = gguf.GGMLQuantizationType[short]
            yield renamed(name), gguf.quants.quantize(values, form), form

    for one, values, form in stored():
        writer.add_tensor_info(one, values.shape, values.dtype, values.nbytes, form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, values, _ in stored():
        writer.write_tensor_data(values)
    writer.close()


def renamed(name: str) -> str:
    """Return the name in a GGUF file of a weight of transformers."""
    stem, _, kind = name.rpartition(".")
    if stem == "lm_head":
        return f"output.{kind}"
    stem = stem.removeprefix("model.")
    if not stem.startswith("layers."):
        return f"{_flipped(OUTER)[stem]}.{kind}"
    _, number, inner = stem.split(".", 2)
    return f"blk.{number}.{_flipped(INNER)[inner]}.{kind}"


def _flipped(names: dict[str, str]) -> dict[str, str]:
    return {value: key for key, value in names.items()}


def _ordered(
    name: str, values: np.ndarray, architecture: str, config: dict[str, Any]
) -> np.ndarray:
    """Return a weight whose rotary pairs are in the order of llama.cpp: side by side for llama."""
    counts = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    count = counts.get(name.split(".")[-2]) if architecture == "llama" else None
    if not count:
        return values
    rows = values.reshape(config[count], 2, -1, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def _add_rope(writer: Any, config: dict[str, Any]) -> np.ndarray | None:
    """Add the rotary positions. Return what Llama 3.1's frequencies are divided by, a tensor of the
    file; None for others."""
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind == "llama3":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        original = rope["original_max_position_embeddings"]
        of_rope = (rope["rope_theta"], config["head_dim"], rope["factor"], original)
        return llama3_divisors(*of_rope).astype(np.float32)
    if kind in ("linear", "yarn"):
        writer.add_string(f"{writer.arch}.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(rope["factor"])
        if original := rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)
    elif kind != "default":
        raise UserError("format", f"GGUF has no rotary positions of the kind {kind}", _TODO)
    return None


def vocabulary(
    tokenizer: Tokenizer, config: dict[str, Any], template: str | None
) -> dict[str, Any]:
    """Return the keys of the tokenizer, without "tokenizer."."""
    spec = json.loads(tokenizer.to_str())
    model, added = spec["model"], spec["added_tokens"]
    if model["type"] != "BPE":
        raise UserError("format", f"GGUF has no {model['type']} tokenizer", _TODO)
    by_id = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    of_pieces = bool(model["byte_fallback"])
    kinds = dict.fromkeys(by_id, _NORMAL)
    if of_pieces:
        kinds |= {i: _BYTE for i, t in by_id.items() if len(t) == 6 and t[:3] == "<0x"}
    kinds |= {t["id"]: _CONTROL if t["special"] else _USER for t in added}
    unknown = next((i for i, t in by_id.items() if t == model["unk_token"]), None)
    kinds |= {} if unknown is None else {unknown: _UNKNOWN}
    rows = range(config["vocab_size"])  # the embedding may have more than there are tokens
    keys: dict[str, Any] = {
        "ggml.tokens": [by_id.get(i, f"[PAD{i}]") for i in rows],
        "ggml.token_type": [kinds.get(i, _UNUSED) for i in rows],
    }
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if of_pieces:
        ranks = {"".join(m.split(" ")): -float(i) for i, m in reversed([*enumerate(merges)])}
        keys |= {"ggml.model": "llama", "ggml.pre": "default"}
        keys["ggml.scores"] = [ranks.get(by_id.get(i, ""), -1e9) for i in rows]
        keys["ggml.add_space_prefix"] = _has_prefix(spec)
    else:
        # A file without merges is refused by llama.cpp, so a tokenizer of bytes has one that makes
        # no token, and so is never used.
        keys |= {"ggml.model": "gpt2", "ggml.pre": _split_of(spec)}
        keys["ggml.merges"] = merges or [f"{by_id[0]} {by_id[0]}"]
    keys |= _special(tokenizer, config) | ({"chat_template": template} if template else {})
    return keys if unknown is None else {**keys, "ggml.unknown_token_id": unknown}


def _special(tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of the tokens around a text: what a file leaves out, llama.cpp guesses."""
    whole = tokenizer.encode("a").ids
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    first, last = whole[:start], whole[start + len(bare) :]
    eos = config["eos_token_id"]
    ends = [*dict.fromkeys(eos if isinstance(eos, list) else [eos])]
    bos = config.get("bos_token_id")
    bos = first[0] if first else ends[0] if bos is None else bos
    if len(first) > 1 or last not in ([], ends[:1]):
        raise UserError("format", "its tokenizer frames texts as no GGUF file can say", _TODO)
    ids = dict(zip(("eos", "eot", "eom"), ends, strict=False)) | {"bos": bos}
    if config.get("pad_token_id") is not None:
        ids["padding"] = config["pad_token_id"]
    adds = {"ggml.add_bos_token": bool(first), "ggml.add_eos_token": bool(last)}
    return adds | {f"ggml.{name}_token_id": i for name, i in ids.items()}


def _has_prefix(spec: dict[str, Any]) -> bool:
    """Return whether a tokenizer of pieces puts a space before a text. Raises UserError for one
    that changes or splits texts otherwise than SentencePiece."""
    parts = [*_parts(spec["normalizer"], "normalizers")]
    parts += _parts(spec["pre_tokenizer"], "pretokenizers")
    if others := {part["type"] for part in parts} - {"Prepend", "Replace", "Metaspace"}:
        problem = f"its tokenizer has {', '.join(sorted(others))}, which llama.cpp's doesn't"
        raise UserError("format", problem, _TODO)
    schemes = [part["prepend_scheme"] for part in parts if part["type"] == "Metaspace"]
    return any(part["type"] == "Prepend" for part in parts) or any(s != "never" for s in schemes)


def _split_of(spec: dict[str, Any]) -> str:
    """Return llama.cpp's name of the split of texts of a tokenizer.json. Raises UserError without
    one: then llama.cpp would read the same text as other tokens."""
    *before, last = _parts(spec["pre_tokenizer"], "pretokenizers") or [{}]
    changes = {part["type"] for part in _parts(spec["normalizer"], "normalizers")} - {"NFC"}
    ignores = bool(spec["model"].get("ignore_merges"))
    name = None
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"] and not changes:
        kinds = [part["type"] for part in before]
        if last["use_regex"] and kinds in ([], ["Digits"]) and not ignores:
            is_whole = all(part["individual_digits"] for part in before)
            name = ("smollm" if kinds else "gpt-2") if is_whole else None
        elif kinds == ["Split"] and not last["use_regex"]:
            [split] = before
            pattern = split["pattern"].get("Regex", "")
            fits = split["behavior"] == "Isolated" and not split["invert"]
            names = ("llama-bpe",) if ignores else ("qwen2",)
            name = next((n for n in names if fits and SPLITS[n] == pattern), None)
    if name is None:
        problem = "its tokenizer splits texts as no pre-tokenizer of llama.cpp that is known does"
        raise UserError("format", problem, _TODO)
    return name


def _parts(node: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    return [] if node is None else node.get(inside, [node])
