"""The coordinate check of a parametrisation (Yang, Hu et al. 2022, arXiv 2203.03466, appendix D.1).

How large activations are at each width or depth, and how far a few updates move them. Tokens are
drawn by Zipf's law, so that there is something to learn; the logits are those of the targets: what
becomes of all the others is mostly chance, which shrinks with width.

Invariant: one thing grows at a time (width by the number of heads, or depth), from a base of 64 by
2; one seed draws one batch, whatever the size; the optimizer's groups are those of a real run.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, linear_regression
from typing import Any

import torch
from torch import Tensor, nn

from forescale.config.sections.optimizer import AdamWConfig, MuonConfig, OptimizerConfig
from forescale.engine.optim import parameter_groups
from forescale.models import ModelConfig, Transformer
from forescale.models.choices import CompleteP, Mup, Standard

HEAD_DIM, VOCABULARY, LENGTH, WINDOWS = 16, 64, 32, 4
ADAMW = AdamWConfig(learning_rate=4e-3)
MUON = MuonConfig(adam_learning_rate=4e-3)
LAYERS = ("embedding", "attention", "mlp", "stream", "logits")  # the inner three: the last block's


@dataclass(frozen=True)
class Coordinates:
    """Of each of LAYERS, means over a batch, one a step, the first before any update: |activation|,
    and |activation - what it was before any update|."""

    size: dict[str, list[float]]
    move: dict[str, list[float]]


def model_of(parametrization: str, width: int = 64, depth: int = 2, **keys: Any) -> ModelConfig:
    """A model whose base is 64 by 2."""
    sizes: dict[str, Any] = {
        "num_layers": depth,
        "width": width,
        "num_heads": width // HEAD_DIM,
        "mlp_width": 4 * width,
        "vocab_size": VOCABULARY,
        "max_sequence_length": LENGTH,
    }
    kinds = {"mup": Mup(base_width=64), "completep": CompleteP(base_width=64, base_depth=2)}
    return ModelConfig(**sizes | {"parametrization": kinds.get(parametrization, Standard())} | keys)


def optimizers(model: Transformer, settings: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """By the groups of the recipe. Muon is torch's, with the scale of DeepSpeed's."""
    named, muon = model.named_parameters(), model.muon_parameters()
    built: list[torch.optim.Optimizer] = []
    for g in parameter_groups(named, settings, muon, model.optimizer_factors()):
        shared: dict[str, Any] = {"lr": g.peak_learning_rate, "weight_decay": g.weight_decay}
        if g.update.is_by_matrix:
            built.append(torch.optim.Muon(g.params, momentum=settings.momentum or 0.0, **shared))
        else:
            betas = (settings.beta1, settings.beta2)
            built.append(torch.optim.AdamW(g.params, betas=betas, eps=g.eps, **shared))
    return built


def coordinates(
    config: ModelConfig, settings: OptimizerConfig = ADAMW, steps: int = 8, seed: int = 0
) -> Coordinates:
    """Of a new model that makes `steps` updates on one batch of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    frequency = 1 / torch.arange(1, VOCABULARY + 1).expand(WINDOWS, -1)
    tokens = torch.multinomial(frequency, LENGTH + 1, replacement=True, generator=generator)
    x, y = tokens[:, :-1], tokens[:, 1:]
    torch.manual_seed(seed)
    model = Transformer(config)
    built = optimizers(model, settings)
    sizes = []
    for step in range(steps + 1):
        if step:
            (model(x, y).sum() / y.numel()).backward()
            for optimizer in built:
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad(), _heard(model) as at:
            at["logits"] = model(x).gather(-1, y[..., None])
        sizes.append(at)

    def means(layer: str, origin: Tensor | float) -> list[float]:
        return [(at[layer] - origin).abs().mean().item() for at in sizes]

    size = {layer: means(layer, 0.0) for layer in LAYERS}
    return Coordinates(size, {layer: means(layer, sizes[0][layer]) for layer in LAYERS})


@contextmanager
def _heard(model: Transformer) -> Iterator[dict[str, Tensor]]:
    """What each layer puts out the first time."""
    last: Any = model.blocks[-1]
    modules: dict[str, nn.Module] = {"embedding": model.embedding, "stream": last}
    modules |= {"attention": last.mixer, "mlp": last.mlp}
    outputs: dict[str, Tensor] = {}

    def hear(layer: str):
        def hook(module: nn.Module, arguments: Any, out: Tensor) -> None:
            outputs.setdefault(layer, out)

        return hook

    handles = [m.register_forward_hook(hear(layer)) for layer, m in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def over(
    axis: str,
    sizes: Sequence[int],
    parametrization: str,
    settings: OptimizerConfig = ADAMW,
    seeds: int = 2,
    steps: int = 8,
    **keys: Any,
) -> dict[int, list[Coordinates]]:
    """Of models of each of `sizes` along `axis` (width | depth), one a seed, after `steps`
    updates. more: of the model."""
    return {
        size: [
            coordinates(model_of(parametrization, **{axis: size}, **keys), settings, steps, seed)
            for seed in range(seeds)
        ]
        for size in sizes
    }


def slopes(curves: dict[int, list[Coordinates]], kind: str) -> dict[str, float]:
    """d log / d log size of each layer's `kind` (size | move) after the last update, by least
    squares, over the geometric mean of the seeds. 0: flat."""
    xs = [math.log(size) for size in curves]

    def slope(layer: str) -> float:
        logs = [[math.log(getattr(c, kind)[layer][-1]) for c in row] for row in curves.values()]
        return linear_regression(xs, [fmean(row) for row in logs]).slope

    return {layer: slope(layer) for layer in LAYERS}
