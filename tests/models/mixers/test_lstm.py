"""The LSTM: its definition, its documents to the bit, first weights, groups, and compiled."""

from dataclasses import replace

import pytest
import torch

from forescale.config.sections.optimizer import MuonConfig
from forescale.engine.optim import parameter_groups
from forescale.models import ModelConfig, Transformer
from forescale.models.mixers.lstm_module import Recurrence
from forescale.models.parametrization import factors, scales

CONFIG = ModelConfig(num_layers=2, width=64, num_heads=1, vocab_size=32, max_sequence_length=64,
                     mixer="lstm")  # fmt: skip


def step_by_step(layer, x, keep, h, c):
    """The definition, one token after the other."""
    bias, got = layer.bias_ih_l0 + layer.bias_hh_l0, []
    for t in range(x.shape[1]):
        h, c = h * keep[:, t, None], c * keep[:, t, None]
        gates = x[:, t] @ layer.weight_ih_l0.T + h @ layer.weight_hh_l0.T + bias
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        got.append(h)
    return torch.stack(got, 1), h, c


@pytest.mark.parametrize("length", [1, 2, 7, 40])
@pytest.mark.parametrize("is_cut", [False, True])
def test_it_equals_the_definition_with_its_gradients(length, is_cut):
    torch.manual_seed(length)
    layer = Recurrence(5, 0.4).double()
    x = torch.randn(3, length, 5, dtype=torch.float64, requires_grad=True)
    h, c = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    keep = (torch.rand(3, length) > 0.3 * is_cut).double()
    out, (last_h, last_c) = layer(x, keep if is_cut else None, (h, c))
    local, peer = [out, last_h, last_c], [*step_by_step(layer, x, keep, h, c)]
    torch.testing.assert_close(local, peer)
    args = [x, h, c, *layer.parameters()]
    grads = [torch.autograd.grad(sum(y.square().sum() for y in f), args) for f in (local, peer)]
    torch.testing.assert_close(*grads)


def test_it_begins_with_open_forget_gates_and_the_scale_of_hidden_matrices():
    torch.manual_seed(0)
    mixer = Transformer(CONFIG).blocks[0].mixer
    biases = mixer.recurrence.bias_ih_l0 + mixer.recurrence.bias_hh_l0
    assert biases.view(4, 64).mean(1).tolist() == [0, 1, 0, 0]
    expected = scales(CONFIG)
    for kind in ("ih", "hh"):
        std = getattr(mixer.recurrence, f"weight_{kind}_l0").std().item()
        assert std == pytest.approx(expected.hidden_std, rel=0.03)
    assert mixer.output.weight.std().item() == pytest.approx(expected.writing_std, rel=0.05)


def test_muon_takes_the_output_and_leaves_the_gates_to_adamw():
    model = Transformer(CONFIG)
    muon = MuonConfig(learning_rate=0.02, adam_learning_rate=4e-3)
    got = parameter_groups(model.named_parameters(), muon, model.muon_parameters())
    groups = {name: group.name for group in got for name in group.names}
    mixer = {n.removeprefix("blocks.0.mixer."): g for n, g in groups.items() if "0.mixer." in n}
    kinds = ("ih", "hh")
    assert mixer == {
        **{f"recurrence.weight_{kind}_l0": "decayed" for kind in kinds},
        **{f"recurrence.bias_{kind}_l0": "undecayed" for kind in kinds},
        "output.weight": "muon",
    }


def test_wider_gates_learn_slower_under_mup():
    wide = ModelConfig(num_layers=2, width=512, vocab_size=32, max_sequence_length=64, mixer="lstm",
                       parametrization="mup")  # fmt: skip
    of = {n.removeprefix("blocks.0.mixer."): f for n, f in factors(wide).items()}
    assert of["recurrence.weight_hh_l0"].learning_rate == of["output.weight"].learning_rate == 0.5
    assert of["recurrence.bias_hh_l0"].learning_rate == 1


@pytest.mark.slow  # seconds each
@pytest.mark.parametrize("again", ["none", "selective", "full"])
@pytest.mark.parametrize("cut", [False, True])
def test_it_trains_compiled_with_breaks_around_the_layer(cut, again):
    torch._dynamo.reset()
    model = Transformer(replace(CONFIG, activation_checkpointing=again))
    tokens = torch.randint(0, 32, (2, 16))
    numbers = torch.tensor([[0] * 5 + [1] * 11, [0] * 16]) if cut else None
    parameters = list(model.parameters())
    got = [
        torch.autograd.grad(form(tokens, tokens, documents_BL=numbers).sum(), parameters)
        for form in (torch.compile(model, backend="aot_eager"), model)
    ]
    torch.testing.assert_close(*got)
