"""The parametrisation: how initial weights, forward pass and optimizer depend on width and depth.

The only such formulas in the project. Invariant: at base_width and base_depth, with heads of 64,
`mup` and `completep` compute and train exactly as `standard` does; away from there one learning
rate, tuned at the base, serves every width (mup) or every width and depth (completep). Imports no
torch. m = width / base_width, n = num_layers / base_depth; sigma = init_std, else
sqrt(2 / (5 * width)), where mup and completep take base_width for width.

Initial standard deviations and the forward pass (`Scales`)

1. Tables (embedding, learned and relative positions, head): sigma; those of pairs of tokens and of
   values start at 0. In `standard` that is the "small
   init" of Nguyen and Salazar 2019 (arXiv 1910.05895), which GPT-NeoX-20B trained with (arXiv
   2204.06745): GPT-2's 0.02 at width 1000, and a scale of activations that hardly varies with
   width. In mup and completep it is a constant (Yang & Hu et al. 2022, arXiv 2203.03466, table 8).
2. Hidden matrices: sigma / sqrt(m) (table 8: variance 1 / fan-in); in `standard`, sigma. Doubt:
   the ratio of widths stands for that of fan-ins, so mlp_width / width should stay what it is.
3. Hidden matrices that write to the residual stream (attention and MLP output): those of rule 2
   over sqrt(2 * num_layers), so that the stream's variance doesn't grow with depth (GPT-2, Radford
   et al. 2019, section 2.3); of an encoder-decoder, encoder and decoder by their own layers, and a
   layer of the decoder has 3 such matrices. completep takes base_depth for num_layers: its branches
   shrink by rule 4 instead (Dey et al. 2025, arXiv 2505.01618, table 1).
4. Residual branches: times 1 / n in completep (table 1 with alpha = 1), else 1. Doubt: Yang et al.
   2023 (arXiv 2310.02244) find 1 / sqrt(n) best, for blocks of one layer; ours have two and more,
   where Zheng et al. 2026 (arXiv 2603.00541) derive 1 / n too.
5. Logits: times 1 / m in mup and completep (2203.03466, table 8), tied or not: that table's form is
   the one that shares the table with the embedding. Logits of the new model shrink as 1 / sqrt(m);
   learned ones don't.
6. Attention scores: times sqrt(64) / head_dim in mup and completep (2203.03466, definition 4.1:
   1 / d, for queries and keys grow aligned), else 1 / sqrt(head_dim). Both are 1 / 8 for heads of
   64. Doubt: where the number of heads grows and not their width, neither matters.
7. Sinusoidal positions and scale_embedding: the embedding is multiplied by sqrt(width) in
   `standard` (Vaswani et al. 2017, section 3.4; Gemma), by sqrt(base_width) where rule 1 holds its
   scale constant.

The optimizer, AdamW (`Factors`), in mup and completep; all 1 in `standard`

8. Learning rate: 1 / m for hidden matrices, 1 for all else (2203.03466, table 8; 2505.01618, table
   1: depth asks for n^(alpha - 1) = 1). Doubt: Kalra & Barkeshli 2026 (arXiv 2605.21486) hold that
   the embedding's rate, constant here, is most of what mup gains.
9. Weight decay: m for hidden matrices, 1 for the rest: AdamW multiplies it by the learning rate, so
   the decay of a step is the same at every width (2505.01618, table 1; Wang & Aitchison 2024, arXiv
   2405.13698).
10. Epsilon, as the root mean square of the gradient: 1 / m outside the blocks, 1 / (m n) inside (n
    in completep only; 2505.01618, table 1). Gains of QK-norm are shared by all heads, whose
    gradients add up, so 1 / n there. Doubt: CompleteP's own code takes 1 / (m n) everywhere, and
    says nothing of QK-norm; it matters where gradients come down to epsilon.

Muon

11. None of rules 8 to 10 for the matrices that Muon takes. An orthogonalised update has spectral
    norm 1, which DeepSpeed's Muon multiplies with sqrt(max(1, rows / columns)); that is feature
    learning at any width where the shapes keep their proportions (Yang, Simon & Bernstein 2023,
    arXiv 2310.17813, condition 1: sqrt(rows / columns)), and rule 4 does for depth what it does for
    AdamW. The decay is already independent of width. What AdamW takes beside it follows rules 8 to
    10. Doubt: with num_kv_heads held constant keys and values get wider inputs alone, and so too
    large an update.

Doubt about all: the norm at which gradients are clipped is one number for every size, batch and
length of training are not parametrised at all, and the rules are limits: small models differ.
"""

import math
from dataclasses import dataclass

from forescale.models.choices import CompleteP, Mup
from forescale.models.config import HEAD_DIM, ModelConfig
from forescale.models.flops import layers_of, shapes


@dataclass(frozen=True)
class Scales:
    """Factors of the initial weights and of the forward pass: rules 1 to 7."""

    table_std: float
    hidden_std: float
    writing_std: float  # of the hidden matrices that write to the residual stream
    residual: float  # multiplies a branch before it is added to the stream
    logits: float
    attention: float  # multiplies the products of queries and keys
    embedding: float  # multiplies the embedding, with sinusoidal positions and scale_embedding


@dataclass(frozen=True)
class Factors:
    """Multipliers of AdamW's settings for one class of parameters: rules 8 to 10."""

    of: str  # the class: embedding | hidden | dense | head | block | qk_norm | norm
    learning_rate: float = 1.0
    weight_decay: float = 1.0
    epsilon: float = 1.0


def scales(config: ModelConfig) -> Scales:
    """Return the Scales by rules 1 to 7. Raises ValueError like config.sizes."""
    s = config.sizes
    m, n = _growth(config)
    rules = config.parametrization
    transfers = isinstance(rules, Mup)
    width = rules.base_width if isinstance(rules, Mup) else s.width
    depth = rules.base_depth if isinstance(rules, CompleteP) else s.num_layers
    writers = 3 if config.has_encoder else 2
    sigma = config.init_std or math.sqrt(2 / (5 * width))
    hidden = sigma / math.sqrt(m)
    attention = math.sqrt(HEAD_DIM) / s.head_dim if transfers else 1 / math.sqrt(s.head_dim)
    return Scales(
        table_std=sigma,
        hidden_std=hidden,
        writing_std=hidden / math.sqrt(writers * depth),
        residual=1 / n,
        logits=1 / m,
        attention=attention,
        embedding=math.sqrt(width),
    )


def factors(config: ModelConfig) -> dict[str, Factors]:
    """Return the Factors of each parameter by name (rules 8 to 10); empty for `standard`.

    Raises ValueError like config.sizes.
    """
    if config.parametrization.kind == "standard":
        return {}
    m, n = _growth(config)
    classes = (
        Factors("embedding", epsilon=1 / m),
        Factors("hidden", 1 / m, m, 1 / (m * n)),
        Factors("dense", 1 / m, m, 1 / m),
        Factors("head", epsilon=1 / m),
        Factors("block", epsilon=1 / (m * n)),
        Factors("qk_norm", epsilon=1 / n),
        Factors("norm", epsilon=1 / m),
    )
    by_name = {c.of: c for c in classes}
    parts = [part for layer in layers_of(config) for part in layer.values()]
    shared = {module for part in parts for module in part.per_head}  # by all heads
    stacked = tuple(f".{name}" for part in parts for name in part.stacked)

    def class_of(name: str, shape: tuple[int, ...]) -> str:
        """Return the class of a parameter of flops.shapes."""
        module = name.split(".")[-2]
        if len(shape) == 3 and name.endswith(stacked):
            return "hidden"
        if name.startswith("blocks.") or ".block." in name:
            if module in shared:
                return "qk_norm"
            return "hidden" if len(shape) == 2 else "block"
        if module in ("dense", "join"):
            return "dense" if len(shape) == 2 else "norm"
        if "position" in module or name.startswith(("bigrams.", "value_embeddings.")):
            return "embedding"
        return "norm" if module.endswith("norm") else module

    return {name: by_name[class_of(name, shape)] for name, shape in shapes(config).items()}


def folds(config: ModelConfig) -> dict[str, float]:
    """Return factors of the weights, by parameter, that replace the multipliers of rules 4 to 7.

    A `standard` model of the same sizes with the multiplied weights computes the same, up to the
    rounding of one product. Parameters that don't change are left out. Logits are linear in the
    final norm's gain and bias, which a tied table does not share; The mixer (BlockPart.folds) names
    the module that scores are linear in. Rule 7 goes into the embedding; the final norm undoes it
    if the head is the same table. No exported model has sinusoidal positions, a dense head or a
    stream that is normed.
    """
    if config.parametrization.kind == "standard":
        return {}
    s, scale = config.sizes, scales(config)
    scores = scale.attention * math.sqrt(s.head_dim)
    by_module = {"norm": scale.logits}
    for i, parts in enumerate(layers_of(config)):
        for name, part in parts.items():
            inner = part.folds(config, scores)
            if not config.norms_after:
                inner |= dict.fromkeys(part.writes, scale.residual)
            else:  # a norm after the part undoes any multiplier inside, and has its own gain
                by_module[f"blocks.{i}.{name}_post_norm"] = scale.residual
            by_module |= {f"blocks.{i}.{name}.{module}": by for module, by in inner.items()}
    if config.scale_embedding:  # a standard model multiplies by sqrt(width)
        by_module["embedding"] = scale.embedding / math.sqrt(s.width)
        if config.tie_embeddings:
            by_module["norm"] /= by_module["embedding"]
    by_parameter = {name: by_module.get(name.rpartition(".")[0], 1.0) for name in shapes(config)}
    return {name: by for name, by in by_parameter.items() if by != 1.0}


def _growth(config: ModelConfig) -> tuple[float, float]:
    """Return m and n; each is 1 if the parametrisation does not depend on it."""
    s, rules = config.sizes, config.parametrization
    m = s.width / rules.base_width if isinstance(rules, Mup) else 1.0
    n = s.num_layers / rules.base_depth if isinstance(rules, CompleteP) else 1.0
    return m, n
