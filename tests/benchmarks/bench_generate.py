"""Tokens a second in writing text, ours against transformers' generate on the exported model: the
same prompts, and the same tokens, of one prompt and of several of different lengths at once.

By the processor's time, in one process. Ours is written as `forescale generate` writes it, also as
text; transformers' ids stay ids. And a wide model with products of 8 bits, against fp32.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from forescale.inference.generation import Answer, GenerationConfig, complete
from forescale.inference.question import Question
from forescale.models.config import ModelConfig
from forescale.models.decoding.products import prepare
from forescale.models.decoding.sampler import Sampler
from forescale.models.hf import to_hf
from forescale.models.transformer import Transformer
from tests.benchmarks.pairing import Result, interleaved
from tests.benchmarks.processes import isolated


@dataclass(frozen=True)
class Sizes:
    """models by name; wide: the one of 8 bits; batches: prompts at once; tokens: of the longest
    prompt, and written."""

    models: dict[str, ModelConfig]
    wide: ModelConfig
    batches: tuple[int, ...]
    tokens: tuple[int, int]


def _model(layers: int, width: int, vocabulary: int, kv_heads: int | None = None) -> ModelConfig:
    # A large deviation: tokens are likely enough that rounding changes none.
    return ModelConfig(
        num_layers=layers, width=width, num_heads=max(2, width // 64), num_kv_heads=kv_heads,
        vocab_size=vocabulary, max_sequence_length=1024, init_std=0.2,
    )  # fmt: skip


REAL = Sizes(
    {
        "3 layers of 128": _model(3, 128, 4096),
        "8 layers of 512": _model(8, 512, 32_768),
        "8 layers of 512, grouped-query": _model(8, 512, 8192, kv_heads=2),
    },
    _model(4, 2048, 8192),
    (1, 16),
    (64, 192),
)
TOY = Sizes({"1 layer of 32": _model(1, 32, 128)}, _model(1, 512, 128), (1, 3), (8, 6))


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    return [
        isolated(compare, rounds, name, model, batch, *sizes.tokens)
        for name, model in sizes.models.items()
        for batch in sizes.batches
    ] + [isolated(compare_int8, rounds, sizes.wide, n) for n in sizes.batches]


def compare(
    rounds: int, name: str, config: ModelConfig, batch: int, prompt: int, num_tokens: int
) -> Result:
    torch.manual_seed(0)
    model = Transformer(config).eval()
    drawn = torch.Generator().manual_seed(1)
    lengths = [max(1, prompt - i) for i in range(batch)]
    size = config.sizes.vocab_size
    prompts = [torch.randint(1, size, (n,), generator=drawn).tolist() for n in lengths]
    rival = exported(model)
    prepare(model)
    tokens = torch.tensor([[0] * (prompt - len(row)) + row for row in prompts])
    real = torch.tensor([[0] * (prompt - len(row)) + [1] * len(row) for row in prompts])
    how: dict[str, Any] = dict(do_sample=False, max_new_tokens=num_tokens, pad_token_id=0)
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(size)}, "0"))
    generation = GenerationConfig(num_tokens, Sampler(temperature=0))
    results: dict[str, list[str]] = {}

    def product() -> float:
        context = config.sizes.max_sequence_length
        began = time.process_time()
        questions = [Question("", "", row, row, -1, "document", context) for row in prompts]
        answers = [Answer(tokenizer, question, generation, 0) for question in questions]
        results["ours"] = [answer.text for answer in complete(model, answers, batch)]
        spent = time.process_time() - began
        return batch * num_tokens / spent

    def peer() -> float:
        began = time.process_time()
        rows = rival.generate(tokens, attention_mask=real, **how)
        spent = time.process_time() - began
        results["theirs"] = ["".join(f" {i}" for i in row) for row in rows[:, prompt:].tolist()]
        return batch * num_tokens / spent

    rows = interleaved(rounds, product, peer)
    pairs = zip(results["ours"], results["theirs"], strict=True)
    equal = sum(a == b for a, b in pairs) / batch
    labels = ("ours", "transformers")
    where = f"generate, {name}, {batch} at once"
    return Result(where, "tokens/s", labels, rows, "at least 1", {"rows with equal tokens": equal})


def compare_int8(
    rounds: int, config: ModelConfig, batch: int, prompt: int = 32, num_tokens: int = 24
) -> Result:
    generation = GenerationConfig(num_tokens, Sampler(temperature=0))
    size = config.sizes.vocab_size
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(size)}, "0"))
    rows = torch.randint(1, size, (batch, prompt), generator=torch.Generator().manual_seed(1))

    def rate(int8: bool) -> Callable[[], float]:
        torch.manual_seed(0)
        model = prepare(Transformer(config).eval(), int8)

        def spend() -> float:
            questions = [Question("", "", row, row, -1, "document", 1024) for row in rows.tolist()]
            began = time.process_time()
            answers = [Answer(tokenizer, question, generation, 0) for question in questions]
            assert len(list(complete(model, answers, batch))) == batch
            return batch * num_tokens / (time.process_time() - began)

        return spend

    name = f"generate, {config.sizes.num_layers} layers of {config.sizes.width}, {batch} at once"
    sides = interleaved(rounds, rate(True), rate(False))
    return Result(name, "tokens/s", ("int8", "fp32"), sides)


def exported(model: Transformer) -> Any:
    """The model as transformers loads it."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hf_config, tensors = to_hf(model.config, model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(hf_config))
        tensors_of = {name: tensor.contiguous() for name, tensor in tensors}
        save_file(tensors_of, path / "model.safetensors", metadata={"format": "pt"})
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    peer.generation_config.eos_token_id = None  # neither side may end early
    return peer
