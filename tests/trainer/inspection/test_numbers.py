"""Maps, ablations and traces equal slow references: transformers' attentions, weights set to zero,
one changed state at a time."""

import pytest
import torch
import transformers

from forescale.inspection import heads, interventions
from forescale.inspection.edits import edited, token_losses
from forescale.inspection.interventions import ablate
from forescale.models.hf import to_hf
from forescale.models.transformer import Transformer
from tests.models.configs import model_config

SIZES = dict(num_layers=2, width=32, num_heads=4, num_kv_heads=2, vocab_size=64, bias=False)
L = 13
VARIANTS = {
    "attention": dict(),
    "window": dict(mixer="window", mixer__window=4, mixer__global_tokens=1),
    "latent": dict(mixer="latent", num_kv_heads=4),
    "alibi": dict(position="alibi"),
    "relative": dict(position="relative"),
}


def build(**keys) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(model_config(**{**SIZES, "max_sequence_length": 64, **keys})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def text(seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (L,), generator=torch.Generator().manual_seed(seed))


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(
        torch.as_tensor(actual).double(), torch.as_tensor(expected).double(),
        atol=tolerance, rtol=tolerance,
    )  # fmt: skip


def test_maps_are_the_attentions_of_transformers():
    model, x = build(mixer__qk_norm="head"), text()
    config, state = to_hf(model.config, model.state_dict())
    hf = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager"
    ).eval()
    hf.load_state_dict(dict(state))
    expected = hf(x[None], output_attentions=True).attentions
    result = heads.maps_of(model, x)
    for layer, weights in enumerate(expected):
        close(result[layer], weights[0].detach())


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_row_of_a_map_adds_up_to_1_and_gives_the_heads_output(kind):
    model, x, outputs = build(**VARIANTS[kind]), text(), {}

    def keep(layer, values):
        outputs[layer] = values[0]
        return values

    values = {}
    if kind == "attention":
        hooks = [
            b.mixer.value.register_forward_hook(
                lambda m, a, y, i=i: values.__setitem__(i, y[0].view(L, 2, 8))
            )
            for i, b in enumerate(model.blocks)
        ]
    with torch.no_grad(), edited(model, heads=keep):
        model(x[None])
    for layer, weights in heads.maps_of(model, x).items():
        close(weights.sum(-1), torch.ones(4, L))
        assert (weights.triu(1) == 0).all()
        if kind == "attention":
            mean = torch.einsum("hls,shk->lhk", weights, values[layer].repeat_interleave(2, 1))
            close(outputs[layer], mean)
        if kind == "window":  # three tokens before, itself, and the first one
            assert (weights[:, 9, 1:6] == 0).all()
            assert (weights[:, 9, [0, 6, 7, 8, 9]] > 0).all()
    if kind == "attention":
        [hook.remove() for hook in hooks]


@pytest.mark.parametrize("kind", ["attention", "window", "latent"])
def test_a_head_without_its_columns_of_the_output_matrix(kind):
    model, x = build(**VARIANTS[kind]), text()
    result = ablate(model, x)
    whole = token_losses(model(x[None]), x[None]).mean()
    for layer, block in enumerate(model.blocks):
        saved = block.mixer.output.weight.detach().clone()
        for head in range(4):
            with torch.no_grad():
                block.mixer.output.weight[:, 8 * head : 8 * head + 8] = 0
            close(
                result.heads[layer][head],
                (token_losses(model(x[None]), x[None]).mean() - whole).item(),
            )
            with torch.no_grad():
                block.mixer.output.weight.copy_(saved)


@pytest.mark.parametrize("mixer", ["attention", "mingru", "lstm", "gated_deltanet"])
def test_a_part_without_its_output_matrix(mixer):
    model, x = build(mixer=mixer), text()
    result = ablate(model, x)
    whole = token_losses(model(x[None]), x[None]).mean()
    assert bool(result.heads[0]) == (mixer == "attention")
    for layer, block in enumerate(model.blocks):
        for part, numbers in ((block.mixer, result.mixers), (block.mlp, result.mlps)):
            name = "output" if hasattr(part, "output") else "down"
            matrix = getattr(part, name).weight
            saved = matrix.detach().clone()
            with torch.no_grad():
                matrix.zero_()
                close(numbers[layer], token_losses(model(x[None]), x[None]).mean() - whole)
                matrix.copy_(saved)


def test_nothing_is_left_of_an_edit():
    model, x = build(), text()
    before = model(x[None])
    ablate(model, x)
    heads.maps_of(model, x)
    assert torch.equal(model(x[None]), before)
    assert "_attend" not in vars(model.blocks[0].mixer)


def test_the_last_row_of_the_lens_is_what_the_model_says():
    model, x = build(), text()
    result = heads.lens(model, x)
    assert result.shape == (3, L, 64)
    close(result[-1], model(x[None])[0].detach())


def test_a_trace_equals_one_state_at_a_time():
    model, x = build(), text()
    result = interventions.trace(model, x, 2, 4, seed=5)
    streams = []

    def keep(layer, values):
        streams.append(values)
        return values

    with torch.no_grad(), edited(model, stream=keep):
        after = model(x[None])[0, -1].softmax(-1)
    assert result.answer == int(after.argmax())
    close(result.clean, after.max())
    generator = torch.Generator().manual_seed(5)
    noise = 3 * streams[0].std() * torch.randn(interventions.DRAWS, 2, 32, generator=generator)
    for layer, column in ((0, 3), (1, L - 1), (0, 7)):
        total = 0.0
        for draw in noise:

            def edit(at, values, draw=draw, layer=layer, column=column):
                values = values.clone()
                if at == 0:
                    values[:, 2:4] += draw
                if at == layer + 1:
                    values[:, column] = streams[at][:, column]
                return values

            with torch.no_grad(), edited(model, stream=edit):
                total += model(x[None])[0, -1].softmax(-1)[result.answer].item()
        close(result.restored["stream"][layer][column], total / interventions.DRAWS)
    # Behind the last block only the last token's state is read; before the subject all is clean.
    last = result.restored["stream"][-1]
    close(last[-1], result.clean)
    close(last[:-1], [result.corrupted] * (L - 1))
    close(result.restored["mlp"][0][0], result.corrupted)


def test_heads_are_described_by_their_weights():
    look = torch.eye(9)[[0, 0, 1, 2, 3, 2, 3, 4, 5]]  # of the second copies: behind the first
    previous = torch.eye(9)[[0, *range(8)]]
    flat = torch.ones(9, 9).tril() / torch.arange(1, 10)[:, None]
    maps = {0: torch.stack([look, previous, flat])}
    result = heads.describe(maps, maps)[0]
    assert [h.is_induction for h in result] == [True, False, False]
    assert result[0].induction == 1
    assert (result[1].previous, result[1].distance, result[1].entropy) == (1, 1, 0)
    expected = torch.log2(torch.arange(2, 10).float()).mean().item()
    assert result[2].entropy == pytest.approx(expected)
    assert result[2].distance == pytest.approx(sum(i / 2 for i in range(1, 9)) / 8)


@pytest.mark.parametrize("mixer", ["mingru", "lstm", "gated_deltanet"])
def test_an_influence_is_the_norm_of_the_jacobian(mixer):
    model, x = build(mixer=mixer), text()[:6]
    result = heads.influences_of(model, x)
    assert set(result) == {0, 1}
    inputs_of = {}
    model.blocks[1].mixer.register_forward_pre_hook(lambda m, a: inputs_of.update(a=a))
    model(x[None])
    inputs, *rest = inputs_of["a"]
    jacobian = torch.autograd.functional.jacobian(
        lambda i: model.blocks[1].mixer(i, *rest)[0], inputs.detach()
    )
    exact = jacobian[:, :, 0].square().sum((1, 3)).sqrt()
    exact /= exact.sum(-1, keepdim=True)
    assert (result[1].triu(1) == 0).all()
    assert (result[1] - exact).abs().max() < 0.15  # eight random directions
