"""What `mup` and `completep` ask of each parameter, and that at their base they are `standard`."""

import math
from dataclasses import replace

import pytest
import torch

from forescale.config.sections.optimizer import AdamWConfig
from forescale.engine.optim import parameter_groups
from forescale.models import ModelConfig, Transformer
from forescale.models.choices import CompleteP, Mup
from forescale.models.parametrization import Factors, factors, scales
from tests.models.configs import changed, model_config

# Four times as wide and three times as deep as its base.
LARGE = model_config(
    num_layers=6, width=256, num_heads=2, bias=True, vocab_size=64, max_sequence_length=16
)
MUP, COMPLETEP = Mup(base_width=64), CompleteP(base_width=64, base_depth=2)
BASE = changed(LARGE, num_layers=2, width=64, num_heads=1)
SIGMA = math.sqrt(2 / (5 * 64))  # of the base


def test_weights_and_forward_of_each():
    standard = scales(LARGE)
    assert (standard.residual, standard.logits) == (1, 1)
    assert standard.attention == 1 / math.sqrt(128)
    assert standard.table_std == standard.hidden_std == math.sqrt(2 / (5 * 256))
    assert standard.writing_std == standard.hidden_std / math.sqrt(12)
    assert standard.embedding == 16
    mup = scales(changed(LARGE, parametrization=MUP))
    assert (mup.table_std, mup.hidden_std) == (SIGMA, SIGMA / 2)
    assert mup.writing_std == SIGMA / 2 / math.sqrt(12)
    assert (mup.residual, mup.logits, mup.attention, mup.embedding) == (1, 1 / 4, 8 / 128, 8)
    completep = scales(changed(LARGE, parametrization=COMPLETEP))
    assert completep == replace(mup, residual=1 / 3, writing_std=SIGMA / 2 / math.sqrt(4))
    assert scales(changed(LARGE, parametrization=MUP, init_std=0.5)).hidden_std == 0.25


def test_the_optimizer_of_each():
    assert factors(LARGE) == {}
    mup = factors(changed(LARGE, parametrization=MUP))
    assert mup["embedding.weight"] == Factors("embedding", 1, 1, 1 / 4)
    assert mup["head.weight"] == Factors("head", 1, 1, 1 / 4)
    assert mup["blocks.0.mlp.down.weight"] == Factors("hidden", 1 / 4, 4, 1 / 4)
    assert mup["blocks.5.mixer.query.bias"] == Factors("block", 1, 1, 1 / 4)
    assert mup["blocks.5.mlp_norm.weight"] == Factors("block", 1, 1, 1 / 4)
    assert mup["blocks.5.mixer.key_norm.weight"] == Factors("qk_norm", 1, 1, 1)
    assert mup["norm.weight"] == Factors("norm", 1, 1, 1 / 4)
    completep = factors(changed(LARGE, parametrization=COMPLETEP))
    for name, by in mup.items():
        inside = name.startswith("blocks.")
        assert completep[name] == replace(by, epsilon=by.epsilon / 3 if inside else by.epsilon)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"position": "learned", "norm": "layernorm", "mlp": "gelu", "mixer__qk_norm": "none"},
        {"tie_embeddings": True, "bias": False},
    ],
)
def test_every_parameter_has_a_class(change):
    model = Transformer(changed(LARGE, parametrization=COMPLETEP, **change))
    assert list(model.optimizer_factors()) == [name for name, _ in model.named_parameters()]


def trained(config: ModelConfig, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a few AdamW steps as the recipe has them."""
    torch.manual_seed(0)
    model = Transformer(config)
    named = model.named_parameters()
    groups = parameter_groups(named, AdamWConfig(), factors=model.optimizer_factors())
    settings = [
        {"params": g.params, "lr": g.peak_learning_rate, "weight_decay": g.weight_decay}
        | {"eps": g.eps}
        for g in groups
    ]
    optimizer, losses = torch.optim.AdamW(settings), []
    x = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        loss = model(x[:, :-1], x[:, 1:]).sum() / 64
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("parametrization", [MUP, COMPLETEP], ids=["mup", "completep"])
@pytest.mark.parametrize("change", [{}, {"tie_embeddings": True, "position": "sinusoidal"}])
def test_at_its_base_it_is_standard_to_the_bit(parametrization, change):
    losses, weights = trained(changed(BASE, **change))
    again, same = trained(changed(BASE, parametrization=parametrization, **change))
    assert losses == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_decay_of_a_step_is_the_same_at_every_width():
    def decay(config: ModelConfig) -> dict[str, float]:
        groups = parameter_groups(
            Transformer(config).named_parameters(), AdamWConfig(), factors=factors(config)
        )
        return {g.name: g.peak_learning_rate * g.weight_decay for g in groups}

    large = decay(changed(LARGE, parametrization=COMPLETEP))
    assert large == decay(changed(BASE, parametrization=COMPLETEP))
    assert large["decayed_hidden"] > 0
