"""A GGUF file, as llama.cpp has them, in the place of a Hugging Face directory.

Its weights are dequantised by the package gguf, exactly as they are in the file; its tokenizer and
its metadata become a tokenizer.json and the small files that transformers would have.

Invariant: as of hf_directory.py. What a file leaves open (a pre-tokenizer, an architecture) is
refused, not guessed.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from torch import Tensor

from forescale.ground.errors import UserError
from forescale.inference.hf_directory import CONFIG, TEMPLATE
from forescale.models.hf.families import FAMILIES

# Architectures whose tensors are those of the family of the same name, but for the order of rotary
# pairs, which only `llama` has as llama.cpp computes them (convert_hf_to_gguf.py, `permute`).
ARCHITECTURES = ("llama", "qwen2", "qwen3")
OUTER = {"token_embd": "embed_tokens", "output_norm": "norm"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE = "rope_freqs.weight"
_ORIGINAL = 8192  # the original length of all of Llama 3.1 to 3.3, which their files don't say
# The splits of texts by the name of the pre-tokenizer (llama.cpp, llama-vocab.cpp).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
SPLITS: dict[str, str | None] = {
    **dict.fromkeys(("gpt-2", "olmo", "phi-2"), None),  # None: as GPT-2
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), r"\p{N}"),  # and single digits
    **dict.fromkeys(_LLAMA3, _WORDS % "{1,3}"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _WORDS % ""),
}
_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # kinds of tokens
_SPACE = "\u2581"


def package_of(path: Path) -> Any:
    """Return the package gguf. Raises UserError, about this file, where it isn't installed."""
    try:
        import gguf
    except ModuleNotFoundError as e:
        problem = f"a GGUF file needs the package {e.name}, which isn't installed"
        raise UserError(str(path), problem, "pip install 'forescale[gguf]'") from None
    return gguf


def llama3_divisors(theta: float, head: int, factor: float, original: int) -> np.ndarray:
    """Return what the frequencies of Llama 3.1 to 3.3 are divided by, one for each rotary pair."""
    even = np.arange(0, head, 2) / head
    share = np.clip((original / (2 * np.pi) / theta**even - 1) / 3, 0, 1)
    return 1 / ((1 - share) / factor + share)


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file. pairs: the heads whose rotary pairs are put in order; 0: none."""

    tensor: Any
    pairs: int

    def described(self) -> Tensor:
        """Return a tensor on the meta device of the same shape and number format."""
        sizes = [*map(int, reversed(self.tensor.shape))]
        return torch.empty(sizes, dtype=self._dtype, device="meta")

    def read(self) -> Tensor:
        """Return the tensor, dequantised."""
        from gguf.quants import dequantize

        values = dequantize(self.tensor.data, self.tensor.tensor_type)
        if self.pairs:
            rows = values.reshape(self.pairs, -1, 2, *values.shape[1:])
            values = rows.swapaxes(1, 2).reshape(values.shape)
        return torch.from_numpy(np.array(values)).to(self._dtype)  # exact: it was this before

    @property
    def _dtype(self) -> torch.dtype:
        kinds = {"F16": torch.float16, "BF16": torch.bfloat16}
        return kinds.get(self.tensor.tensor_type.name, torch.float32)


class GgufFile:
    """A model's file; the attributes are those of HfDirectory, and raise UserError as they do."""

    def __init__(self, path: Path):
        self.path = self.config_path = path

    def digest(self) -> str:
        """Return a hash that changes with the file: of its path, size and time."""
        about = self.path.stat()
        facts = f"{self.path.resolve()} {about.st_size} {about.st_mtime_ns}"
        return hashlib.sha256(facts.encode()).hexdigest()

    @cached_property
    def _reader(self) -> Any:
        base: Any = package_of(self.path).GGUFReader

        class Whole(base):
            """A reader that ends with an error where the file ends."""

            def _get(self, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:
                values = super()._get(offset, dtype, count, **order)
                if len(values) < count:
                    raise ValueError("it ends within a value")
                return values

        try:
            return Whole(self.path)
        except OSError as e:
            todo = "give the path of a .gguf file"
            raise UserError(str(self.path), f"can't be read ({e.strerror})", todo) from None
        except Exception as e:  # gguf raises whatever numpy does for what it can't read
            problem = f"is no intact GGUF file ({type(e).__name__}: {e})"
            raise UserError(str(self.path), problem, "download it again") from None

    def _get(self, key: str, default: Any = None) -> Any:
        field = self._reader.fields.get(key)
        value = field.contents() if field else default
        # The decimals that were rounded to fp32: 1e-05 for 9.99999974e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _size(self, key: str, default: Any = None) -> Any:
        return self._get(f"{self._architecture}.{key}", default)

    @cached_property
    def _architecture(self) -> str:
        name = self._get("general.architecture")
        if name not in ARCHITECTURES or self._get(f"{name}.expert_count", 0):
            known = f"{', '.join(ARCHITECTURES)} without experts"
            problem = f"its architecture is {name!r}, and {known} can be imported"
            raise UserError(str(self.path), problem, "import the model's Hugging Face directory")
        return str(name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json would hold."""
        family, tensors, heads = (
            self._architecture,
            self.tensors,
            self._size("attention.head_count"),
        )
        width = self._size("embedding_length")
        try:
            head = self._size("attention.key_length") or width // heads
            vocab = tensors["model.embed_tokens.weight"].described().shape[0]
        except (TypeError, KeyError, ZeroDivisionError):
            problem = "lacks its sizes or its token_embd"
            raise UserError(str(self.path), problem, "download it again") from None
        rope, layer = self._rope(head), "model.layers.0"
        biases = {"attention_bias": f"{layer}.self_attn.q_proj.bias" in tensors}
        biases["mlp_bias"] = f"{layer}.mlp.up_proj.bias" in tensors
        return {
            "architectures": [FAMILIES[family].architecture],
            "model_type": family,
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": self._size("feed_forward_length"),
            "num_hidden_layers": self._size("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._size("attention.head_count_kv", heads),
            "head_dim": head,
            "hidden_act": "silu",
            "max_position_embeddings": self._size("context_length"),
            "rms_norm_eps": self._size("attention.layer_norm_rms_epsilon"),
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else rope,
            "rope_parameters": rope,
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            **(biases if family == "llama" else {}),
            **self._special_ids,
        }

    def _rope(self, head: int) -> dict[str, Any]:
        theta = self._size("rope.freq_base", 10_000.0)
        rope: dict[str, Any] = {"rope_type": self._size("rope.scaling.type", "default")}
        if rope["rope_type"] == "none":
            rope["rope_type"] = "default"
        if rope["rope_type"] != "default":
            rope["factor"] = self._size("rope.scaling.factor")
            original = self._size("rope.scaling.original_context_length")
            rope["original_max_position_embeddings"] = original
        stored = next((t for t in self._reader.tensors if t.name == ROPE), None)
        if stored is not None:  # Llama 3.1 and later: what the frequencies are divided by
            factors = np.asarray(stored.data, np.float64)
            factor = float(factors.max())
            original = self._size("rope.scaling.original_context_length", _ORIGINAL)
            expected = llama3_divisors(theta, head, factor, original)
            if not np.allclose(expected, factors, rtol=1e-3):
                problem = f"its {ROPE} are not those of Llama 3.1 to 3.3"
                raise UserError(str(self.path), problem, "import its Hugging Face directory")
            rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": original}
        return rope | {"rope_theta": theta}

    @cached_property
    def tensors(self) -> dict[str, _Stored]:
        """The tensors, by the names of the Hugging Face architecture."""
        is_llama, heads = self._architecture == "llama", self._size("attention.head_count")
        counts = {"attn_q": heads, "attn_k": self._size("attention.head_count_kv", heads)}
        tensors: dict[str, _Stored] = {}
        for tensor in self._reader.tensors:
            *block, name, kind = tensor.name.split(".")
            if tensor.name == ROPE:
                continue
            whole = f"model.{OUTER[name]}.{kind}" if name in OUTER else tensor.name
            whole = f"lm_head.{kind}" if name == "output" else whole
            if block[:1] == ["blk"] and name in INNER:
                whole = f"model.layers.{'.'.join(block[1:])}.{INNER[name]}.{kind}"
            # Another name stays, and is refused as one that the architecture doesn't have.
            tensors[whole] = _Stored(tensor, counts.get(name, 0) if is_llama else 0)
        return tensors

    @cached_property
    def _special_ids(self) -> dict[str, Any]:
        """The ids as config.json has them: several ends, those of a turn and of a message too."""
        names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        ids = {k: self._get(f"tokenizer.ggml.{name}_token_id") for k, name in names.items()}
        others = [self._get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
        ends = [*dict.fromkeys(i for i in (ids["eos"], *others) if i is not None)]
        ids["eos"] = ends if len(ends) > 1 else ids["eos"]
        return {f"{k}_token_id": i for k, i in ids.items() if i is not None and k != "unk"}

    @cached_property
    def small_files(self) -> dict[str, Any]:
        """The content of the files about tokens and generation, by file name."""
        tokens = self._get("tokenizer.ggml.tokens", [])
        named = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for name in ("bos", "eos", "pad"):
            i = self._special_ids.get(f"{name}_token_id")
            i = i[0] if isinstance(i, list) else i
            if i is not None and i < len(tokens):
                named[f"{name}_token"] = tokens[i]
        files: dict[str, Any] = {CONFIG: self.config, "tokenizer_config.json": named}
        files["generation_config.json"] = dict(self._special_ids)
        if template := self._get("tokenizer.chat_template"):
            files[TEMPLATE] = template
        return files

    @cached_property
    def tokenizer(self) -> bytes | None:
        """The tokenizer.json; None: the file holds no tokens."""
        tokens, kind = self._get("tokenizer.ggml.tokens"), self._get("tokenizer.ggml.model")
        if not tokens:
            return None
        todo = "give tokenizer=FILE, its tokenizer.json"
        if kind not in ("gpt2", "llama"):
            problem = f"its tokenizer is of the kind {kind!r}, and gpt2 and llama can be read"
            raise UserError(str(self.path), problem, todo)
        if kind == "gpt2" and (pre := self._get("tokenizer.ggml.pre", "none")) not in SPLITS:
            problem = f"its pre-tokenizer is {pre!r}, not one of {', '.join(SPLITS)}"
            raise UserError(str(self.path), problem, todo)
        try:
            make = self._byte_level if kind == "gpt2" else self._sentence_pieces
            return str(self._framed(make(tokens), tokens, kind == "llama").to_str()).encode()
        except Exception as e:  # tokenizers raises bare ones
            problem = f"its tokenizer is not intact ({type(e).__name__}: {e})"
            raise UserError(str(self.path), problem, todo) from e

    def _framed(self, tokenizer: Tokenizer, tokens: list[str], is_llama: bool) -> Tokenizer:
        """Return a tokenizer with its special tokens, and the one that precedes a text."""
        kinds = self._get("tokenizer.ggml.token_type", [])
        of_kind = {k: [t for t, i in zip(tokens, kinds, strict=False) if i == k] for k in {*kinds}}
        special = [*of_kind.get(_UNKNOWN, []), *of_kind.get(_CONTROL, [])]
        added = [AddedToken(t, special=True, normalized=False) for t in special]
        tokenizer.add_special_tokens(sorted(added, key=lambda t: tokens.index(t.content)))
        plain = [AddedToken(t, normalized=False) for t in of_kind.get(_USER, [])]
        tokenizer.add_tokens(plain)
        is_first = is_llama or self._get("tokenizer.ggml.pre") in _LLAMA3
        bos = self._special_ids.get("bos_token_id")
        if bos is not None and self._get("tokenizer.ggml.add_bos_token", is_first):
            first = tokens[bos]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{first} $A",
                pair=f"{first} $A {first}:1 $B:1",
                special_tokens=[(first, bos)],
            )
        return tokenizer

    def _byte_level(self, tokens: list[str]) -> Tokenizer:
        pre = self._get("tokenizer.ggml.pre")
        vocab = {token: i for i, token in enumerate(tokens)}
        pairs = [tuple(m.split(" ")) for m in self._get("tokenizer.ggml.merges", [])]
        merges = [pair for pair in pairs if "".join(pair) in vocab]
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _LLAMA3))
        split, is_gpt2 = SPLITS[pre], pre not in _LLAMA3 and "qwen" not in pre
        parts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_gpt2)]
        if split == r"\p{N}":
            parts = [pre_tokenizers.Digits(individual_digits=True), *parts]
        elif split:
            parts = [pre_tokenizers.Split(Regex(split), "isolated"), *parts]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        if "qwen" in pre:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentence_pieces(self, tokens: list[str]) -> Tokenizer:
        """Return SentencePiece's BPE: of two halves the piece with the best score is merged
        first."""
        scores = self._get("tokenizer.ggml.scores", [])
        vocab, merges = {token: i for i, token in enumerate(tokens)}, list[tuple[Any, ...]]()
        for piece, score in zip(tokens, scores, strict=False):
            cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
            halves = [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
            halves.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
            merges += [(-score, pair) for pair in halves]
        merges.sort(key=lambda one: one[0])
        unknown = tokens[self._get("tokenizer.ggml.unknown_token_id", 0)]
        ranked = [pair for _, pair in merges]
        tokenizer = Tokenizer(
            models.BPE(vocab, ranked, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        has_prefix = self._get("tokenizer.ggml.add_space_prefix", True)
        begin = [normalizers.Prepend(_SPACE)] if has_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", _SPACE)])
        end = [decoders.Strip(" ", 1, 0)] if has_prefix else []
        parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end]
        tokenizer.decoder = decoders.Sequence(parts)
        return tokenizer
