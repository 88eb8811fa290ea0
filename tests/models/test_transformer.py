"""How a model begins, and that every way of running it computes the same."""

import math
from dataclasses import replace

import pytest
import torch

from forescale.models import ModelConfig, Transformer
from forescale.models.decoding.batch import generate
from forescale.models.decoding.sampler import Sampler
from tests.models.checks import assert_one_graph

SMALL = ModelConfig(
    num_layers=3,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=64,
    max_sequence_length=16,
    loss_chunk=8,
)


def data(B=4, L=16, V=64):
    x = torch.randint(0, V, (B, L + 1), generator=torch.Generator().manual_seed(0))
    return x[:, :-1], x[:, 1:]


def gradients(model, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    x, y = data()
    losses = model(x, y, documents_BL=(torch.arange(16) // 6).expand_as(x))
    losses.sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in model.parameters())]


def test_weights_begin_as_documented():
    torch.manual_seed(0)
    model = Transformer(replace(SMALL, width=256, num_layers=8, vocab_size=512, bias=True))
    small = math.sqrt(2 / (5 * 256))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.eq(0).all(), name
        elif "norm" in name:
            assert p.eq(1).all(), name
        else:
            to_stream = name.endswith(("mixer.output.weight", "mlp.down.weight"))
            std = small / math.sqrt(2 * 8) if to_stream else small
            assert abs(p.std() / std - 1) < 0.02, name
            assert abs(p.mean()) < std * 0.02, name
    learned = Transformer(replace(SMALL, position="learned", init_std=0.3))
    assert abs(learned.position.weight.std() / 0.3 - 1) < 0.1
    assert abs(learned.embedding.weight.std() / 0.3 - 1) < 0.1


def test_a_new_model_knows_nothing_and_its_seed_decides():
    torch.manual_seed(5)
    model = Transformer(SMALL)
    spread = 2 / 5 / 2  # half the variance of the logits: width * weight_std^2
    assert abs(model(*data()).mean() / 16 - math.log(64) - spread) < 0.1
    torch.manual_seed(5)
    again = Transformer(SMALL)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_losses_are_the_logits_losses():
    model = Transformer(SMALL)
    x, y = data()
    log_p = model(x).log_softmax(-1)
    expected = -log_p.gather(-1, y[..., None]).sum((1, 2))
    torch.testing.assert_close(model(x, y), expected)
    losses, penalty = Transformer(replace(SMALL, z_loss=1e-4))(x, y)
    assert losses.shape == (4,)
    assert penalty.shape == ()


def test_muon_gets_the_hidden_matrices_alone():
    model = Transformer(replace(SMALL, position="learned", bias=True))
    names = model.muon_parameters()
    hidden = {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert names == hidden
    assert len(names) == 3 * 7


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_no_gradient(dropout, kind):
    torch.manual_seed(0)
    plain = Transformer(replace(SMALL, dropout=dropout))
    checkpointed = Transformer(replace(SMALL, dropout=dropout, activation_checkpointing=kind))
    checkpointed.load_state_dict(plain.state_dict())
    for a, b in zip(gradients(plain), gradients(checkpointed), strict=True):
        assert torch.equal(a, b)
    if dropout:
        assert not torch.equal(gradients(plain, 1)[0], gradients(plain, 2)[0])
        assert torch.equal(gradients(plain.eval(), 1)[0], gradients(plain.eval(), 2)[0])


@pytest.mark.slow  # seconds each
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_embeddings": True, "z_loss": 1e-4},
        {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True},
        {"activation_checkpointing": "full", "mlp": "relu2", "position": "sinusoidal"},
    ],
)
def test_compiles_as_one_graph(change):
    model = Transformer(replace(SMALL, **change))
    objective = (lambda out: out[0].sum() + out[1]) if "z_loss" in change else torch.sum
    assert_one_graph(model, lambda of: objective(of(*data())), tolerance=1e-4)


class Counting(torch.nn.Module):
    """Likeliest is the last token plus one; remembers how much context it was shown."""

    longest = 0

    def forward(self, x):
        self.longest = max(self.longest, x.shape[1])
        return torch.nn.functional.one_hot((x + 1) % 10, 10).float() * 5


def test_generation_follows_the_model():
    out = generate(Counting(), torch.tensor([[3, 4], [8, 9]]), 4, sampler=Sampler(temperature=0))
    assert out.tolist() == [[3, 4, 5, 6, 7, 8], [8, 9, 0, 1, 2, 3]]
    out = generate(Counting(), torch.tensor([[3]]), 5, sampler=Sampler(top_k=1))
    assert out.tolist() == [[3, 4, 5, 6, 7, 8]]
    model = Counting()
    generate(model, torch.tensor([[1, 2, 3]]), 9, max_context=4)
    assert model.longest == 4


def test_generation_refuses_nonsense():
    with pytest.raises(ValueError, match="; give"):
        generate(Counting(), torch.zeros(1, 0, dtype=torch.long), 1)
    real = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="takes no padding; give"):
        generate(Counting(), torch.zeros(1, 2, dtype=torch.long), 1, padding_mask_BL=real)
