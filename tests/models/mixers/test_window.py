"""Sliding windows against full attention with a dense mask that a loop writes token by token,
against Mistral of transformers, and against flex_attention's eager form."""

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_mask
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralForCausalLM

from forescale.models import Transformer
from forescale.models.flops import flops_per_token
from forescale.models.hf import to_hf
from forescale.models.mixers import masks, window_module
from forescale.models.mixers.attention_module import Attention
from forescale.models.mixers.context import Columns, Context
from forescale.models.mixers.masks import additive_mask, block_mask, flex, sees
from forescale.models.mixers.window import Window
from forescale.models.mixers.window_module import WindowAttention, plain_view
from forescale.models.positions.position import document_starts, positions_of
from tests.models.configs import changed, model_config

WINDOWS = {
    "window": Window(window=9),
    "token": Window(window=1),
    "sinks": Window(window=20, global_tokens=3),
    "more-sinks": Window(window=2, global_tokens=5),
    "all": Window(window=96),
    "sinks-and-the-rest": Window(window=40, global_tokens=27),
}
L, V = 67, 50


def joins(window: Window, query: int, key: int) -> bool:
    """True if a query sees a key: positions in one document, key <= query."""
    return query - key < window.width or key < window.global_tokens


def rows(kind: str) -> tuple[Tensor | None, Tensor | None]:
    """Return which tokens are real and where documents start, of three rows of L tokens."""
    real = starts = None
    if "padded" in kind:
        real = torch.ones(3, L, dtype=torch.bool)
        real[0, :5] = real[1, -7:] = False
    if "documents" in kind:
        cuts = [[0, 6, 30, 31], [0, 40, 50, 60], [0, 1, 2, 45]]
        numbers = [sum(torch.arange(L) >= cut for cut in row) for row in cuts]
        starts = document_starts(torch.stack(numbers))
    return real, starts


def columns_of(kind: str) -> Columns:
    real, starts = rows(kind)
    return Columns(positions_of(L, torch.device("cpu"), real, starts), L, starts, real)


@cache
def dense(name: str, kind: str) -> Tensor:
    """Return (3, L, L) bool, by a loop over all pairs."""
    window, columns = WINDOWS[name], columns_of(kind)
    visible = torch.zeros(3, L, L, dtype=torch.bool)
    for row in range(3):
        real = [True] * L if columns.real is None else columns.real[row].tolist()
        starts = [0] * L if columns.starts is None else columns.starts[row].tolist()
        place = [sum(real[starts[i] : i]) for i in range(L)]
        for i in range(L):
            for j in range(i + 1):
                same = starts[i] == starts[j] and real[j]
                visible[row, i, j] = i == j or (same and joins(window, place[i], place[j]))
    return visible


def mixers(window: Window) -> tuple[Attention, Attention]:
    """Return full attention and that of the window, with the same weights."""
    torch.manual_seed(0)
    sizes = dict(num_layers=1, width=32, num_heads=4, num_kv_heads=2, vocab_size=V)
    config = model_config(**sizes, max_sequence_length=128, init_std=0.3).resolved()
    full = Attention(config, config.mixer)
    few = WindowAttention(config, window)
    few.load_state_dict(full.state_dict())
    return full, few


KINDS = ("whole", "padded", "documents", "padded documents")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WINDOWS)
def test_it_equals_full_attention_with_a_dense_mask(name, kind):
    window, columns = WINDOWS[name], columns_of(kind)
    full, few = mixers(window)
    visible = dense(name, kind)
    real = torch.ones(3, L, dtype=torch.bool) if columns.real is None else columns.real
    got = []
    for mixer, context in (
        (full, Context(mask=additive_mask(visible[:, None], torch.float32))),
        (few, Context(view=plain_view(window, columns))),
    ):
        x = torch.randn(3, L, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = mixer(x, context)[real]
        target = [x, *mixer.parameters()]
        got.append([y, *torch.autograd.grad(y.square().sum(), target)])
    for peer, computed in zip(*got, strict=True):
        torch.testing.assert_close(computed, peer, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["whole", "padded documents"])
@pytest.mark.parametrize("name", WINDOWS)
def test_the_view_for_a_gpu_shows_the_same(name, kind):
    window, columns = WINDOWS[name], columns_of(kind)
    see = sees(columns, True, window.width, window.global_tokens)
    view, visible = block_mask(see, columns, block=16), dense(name, kind)
    count = len(visible) if kind != "whole" else 1
    assert torch.equal(create_mask(view.mask_mod, count, 1, L, L, "cpu")[:, 0], visible[:count])
    heads = [
        torch.randn(3, L, h, 16, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 1)
    ]
    q, k, v = heads[0], heads[1], heads[2].expand(-1, -1, 2, -1)
    computed = flex(q, k, v, view, None)
    peer = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=visible[:, None], enable_gqa=True
    )
    torch.testing.assert_close(computed, peer.transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "options",
    [
        *({}, dict(mixer="latent"), dict(causal=False)),
        dict(num_kv_heads=4, mixer__value_residual=0.5),
        *(dict(position="alibi", num_kv_heads=heads) for heads in (1, 4)),
    ],
)
def test_documents_and_padding_on_a_gpu_are_seen_as_by_a_dense_mask(options, monkeypatch):
    """The kernel's eager form in place of the kernel, which has no backward pass on a CPU."""
    model = build(**dict(width=64) | options).train()
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, V, (3, 50), generator=generator)
    documents = (torch.rand(3, 50, generator=generator) < 0.1).cumsum(-1)
    real = torch.ones(3, 50, dtype=torch.bool)
    real[1, 41:] = False
    targets = tokens.masked_fill(~real, -100)
    got, built = [], []
    for on_gpu in (False, True):
        monkeypatch.setattr(masks, "fits_flex", lambda columns, on_gpu=on_gpu: on_gpu)
        monkeypatch.setattr(
            model, "_mask", lambda *a: built.append(type(model)._mask(model, *a)) or built[-1]
        )
        with torch.no_grad():
            got.append(model(tokens, targets, padding_mask_BL=real, documents_BL=documents))
    assert [isinstance(mask, torch.Tensor) for mask in built] == [True, False]
    torch.testing.assert_close(got[1], got[0], rtol=1e-5, atol=1e-4)


def build(dtype=torch.float32, **options) -> Transformer:
    torch.manual_seed(0)
    sizes = dict(num_layers=2, width=32, num_heads=4, num_kv_heads=2, mlp_width=24, vocab_size=V)
    config = model_config(**sizes | dict(max_sequence_length=96, init_std=0.3) | options)
    return Transformer(config).to(dtype).eval()


def tokens(rows: int = 2, length: int = L) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("window", [1, 7, 16, 66])
def test_a_window_is_that_of_mistral(window):
    """The same weights, a batch padded on the left, logits and gradients."""
    computed = build(
        mixer="window", mixer__window=window, mixer__qk_norm="none", num_layers=3, init_std=0.1
    )
    peer = MistralForCausalLM(
        MistralConfig(
            vocab_size=V, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
            sliding_window=window, attn_implementation="eager", max_position_embeddings=96,
        )
    ).eval()  # fmt: skip
    as_llama = changed(computed.config, mixer="attention")
    weights = dict(to_hf(as_llama, computed.state_dict())[1])
    peer.load_state_dict({name: tensor.clone() for name, tensor in weights.items()})
    x, real = tokens(), torch.arange(L) >= torch.tensor([[0], [9]])
    places = (real.cumsum(-1) - 1).clamp(min=0)
    got = computed(x, padding_mask_BL=real)[real]
    expected = peer(x, attention_mask=real.long(), position_ids=places).logits[real]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.square().mean().backward()
    expected.square().mean().backward()
    for name in ("q", "k", "v", "o"):
        inner = dict(q="query", k="key", v="value", o="output")[name]
        mine = computed.get_parameter(f"blocks.1.mixer.{inner}.weight").grad
        other = peer.get_parameter(f"model.layers.1.self_attn.{name}_proj.weight").grad
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


SEVERAL = [
    dict(mixer="window", mixer__window=7),
    dict(mixer="window", mixer__window=7, mixer__global_tokens=3),
]


@torch.no_grad()
@pytest.mark.parametrize("few", SEVERAL, ids=str)
def test_it_decodes_in_any_pieces_with_padding_on_the_left(few):
    model, x = build(**few), tokens(3)
    real = torch.arange(L) >= torch.tensor([[0], [9], [21]])
    for pieces in ([22, 30, 1, 1, 13], [1] * L, [40] + [1] * 27):
        read, got, masks = model.new_cache(), [], real.split(pieces, 1)
        for piece, mask in zip(x.split(pieces, 1), masks, strict=True):
            got.append(model(piece, padding_mask_BL=mask, cache=read))
        expected = model(x, padding_mask_BL=real)
        torch.testing.assert_close(torch.cat(got, 1)[real], expected[real], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_cache_of_a_window_does_not_grow():
    model = build(mixer="window", mixer__window=7, mixer__global_tokens=3)
    read = model.new_cache()
    sizes = []
    for piece in tokens(1).split(1, 1):
        model(piece, cache=read)
        sizes.append(read.num_bytes)
    assert sizes[5] == sizes[-1] == 2 * 2 * 16 * 4 * (6 + 3), "layers, kinds, width, bytes, tokens"


@torch.no_grad()
def test_a_step_of_decoding_reads_only_what_it_sees():
    model, x = build(**SEVERAL[1]), tokens(1, L + 1)
    read = model.new_cache()
    model(x[:, :L], cache=read)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x[:, L:], cache=read)
    one_key = flops_per_token(build().config, 1) // 3  # of full attention, forward
    assert counter.get_total_flops() == one_key + 2 * 4 * 32 * (7 + 3 - 1)


@pytest.mark.parametrize("length", [1, 3, 12, 40, 64, 67])
@pytest.mark.parametrize("name", WINDOWS)
def test_pairs_are_those_that_see_each_other(name, length):
    window = WINDOWS[name]
    pairs = sum(joins(window, i, j) for i in range(length) for j in range(i + 1))
    assert window.pairs(length) == pairs


@pytest.mark.parametrize("few", SEVERAL, ids=str)
def test_flops_are_of_the_pairs_that_see_each_other(few):
    config = build(**few).config
    full, computed = (flops_per_token(c, L, causal=True) for c in (build().config, config))
    saved = L * (L + 1) // 2 - config.mixer.pairs(L)
    assert (full - computed) * L == pytest.approx(3 * 2 * 4 * 32 * saved, abs=6 * L)
    assert flops_per_token(config, L) >= computed


@pytest.mark.parametrize("window", [Window(window=128), Window(window=128, global_tokens=4)])
def test_what_is_read_grows_with_the_length_and_not_its_square(window):
    short, long = (window.layout(n) for n in (2048, 16384))
    assert short.reads == long.reads
    assert long.num_blocks == 8 * short.num_blocks


def gradients(model: Transformer, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x, x).sum(), list(model.parameters())))


@pytest.mark.parametrize("few", SEVERAL, ids=str)
def test_layers_that_are_computed_again_have_the_same_gradients(few):
    plain, again = (build(**few, activation_checkpointing=c) for c in ("none", "full"))
    for computed, peer in zip(gradients(again, tokens()), gradients(plain, tokens()), strict=True):
        torch.testing.assert_close(computed, peer)


def test_layers_that_see_the_same_share_a_view(monkeypatch):
    built, view_of = [], window_module.view_of
    monkeypatch.setattr(
        window_module, "view_of", lambda *args: built.append(args) or view_of(*args)
    )
    narrow, wide = (dict(kind="window", window=n) for n in (7, 9))
    build(num_layers=4, mixer_pattern=[narrow, "attention", narrow, wide])(tokens())
    assert len(built) == 2


def test_dropout_drops_scores():
    model = build(mixer="window", mixer__window=7, dropout=0.5).blocks[0].mixer.train()
    x, view = torch.randn(3, L, 32), plain_view(WINDOWS["window"], columns_of("whole"))
    drawn = torch.stack([model(x, Context(view=view)) for _ in range(100)])
    assert not torch.equal(drawn[0], drawn[1])
    expected = model.eval()(x, Context(view=view))
    noise = drawn.std(0) / 100**0.5
    assert ((drawn.mean(0) - expected).abs() < 6 * noise + 1e-6).all()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("few", SEVERAL, ids=str)
def test_it_compiles_for_several_lengths_and_with_documents(few):
    torch._dynamo.reset()
    model = build(**few)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (40, L, 41):
        x = tokens(2, length)
        torch.testing.assert_close(compiled(x), model(x))
    documents = (x == 0).cumsum(-1)
    torch.testing.assert_close(
        compiled(x, documents_BL=documents), model(x, documents_BL=documents)
    )


@torch.no_grad()
def test_a_model_in_bf16_computes_about_the_same():
    for few in SEVERAL:
        exact, rounded = (
            build(dtype, **few)(tokens()) for dtype in (torch.float32, torch.bfloat16)
        )
        assert (rounded - exact).abs().mean() < 0.05 * exact.abs().mean()
