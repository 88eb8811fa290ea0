"""What holds for each mixer of the table: order, padding, documents, cache, counts, bytes, one
graph.

A new mixer is tested here as soon as MIXERS has it; SETTINGS has what it needs to be small.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from forescale.models import ModelConfig, Transformer
from forescale.models.flops import count, flops_per_token, flops_recomputed, matrices, shapes
from forescale.models.memory import activations, cache_bytes
from forescale.models.mixers import MIXERS
from forescale.models.positions.kinds import POSITIONS
from tests.models.checks import assert_one_graph, saved_bytes
from tests.models.configs import model_config

L, V = 12, 37
SETTINGS: dict[str, dict] = {
    # Its output norm magnifies the rounding of outputs near 0: a query may miss all keys.
    "gated_deltanet": dict(norm__eps=1e-2, mixer__value_dim=12),
    "latent": dict(mixer__rank=12, mixer__query_rank=20),
    "window": dict(mixer__window=5, mixer__global_tokens=2),
}
# FLOPs a row and layer that are counted for a whole step, and that torch doesn't need.
SPARED = {"lstm": 2 * 4 * 32 * 32}  # the gradient of the state before the first token
BREAKS = {"lstm": "torch.compile can't trace nn.LSTM, and breaks the graph around it"}
# Patterns of several mixers; the first of each name above is tested alone.
PATTERNS = [[name] for name in MIXERS] + [["mingru", "attention"], ["window", "attention"]]
# Two that share the values of the first layer, by the name of what they have besides.
RESIDUAL = [["attention", "value_residual"], ["window", "attention", "value_residual"]]
# And one with all that is learned of a token and the one before it.
RESIDUAL += [["window", "attention", "value_residual", "tables"]]


def small(pattern: list[str], **options) -> ModelConfig:
    if pattern[-1] == "tables":
        return small(
            pattern[:-1],
            **dict(value_embedding=1, bigram_rows=31, mixer__token_shift=True) | options,
        )
    if pattern[-1] == "value_residual":
        return small(pattern[:-1], mixer__value_residual=0.5, **options)
    sizes = dict(num_layers=2, width=32, num_heads=4, num_kv_heads=2, mlp_width=24, vocab_size=V)
    settings = {k: v for name in pattern for k, v in SETTINGS.get(name, {}).items()}
    # A standard deviation so large that a leak could not hide in rounding.
    base = dict(max_sequence_length=32, loss_chunk=0, init_std=0.3)
    return model_config(**sizes | base | settings | dict(mixer_pattern=pattern) | options)


def build(pattern: list[str], **options) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(small(pattern, **options)).eval()
    for name, table in model.named_parameters():
        if name.startswith(("bigrams.", "value_embeddings.")) or "_shift." in name:
            torch.nn.init.normal_(table, 0, 0.3)  # they begin at 0, and would hide a leak
    return model


def tokens(rows: int, length: int = L) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(3))


def possible(pattern: list[str], position: str) -> str:
    """Return the kind of positions, or skip the test if the mixers take none of that kind."""
    if problems := small(pattern, position=position).problems():
        pytest.skip(str(problems[0]))
    return position


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


pytestmark = pytest.mark.parametrize("pattern", PATTERNS + RESIDUAL, ids="-".join)


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_the_future_never_changes_a_past_logit(pattern, position):
    model, x = build(pattern, position=possible(pattern, position)), tokens(1).repeat(L, 1)
    changed = x.clone()
    changed[torch.arange(L), torch.arange(L)] = (x[0] + 1) % V  # row t differs at position t
    difference = (model(x) - model(changed)).abs().amax(-1)
    past = torch.ones(L, L, dtype=torch.bool).tril(-1)
    assert difference[past].max() == 0, "rows of one shape are rounded alike"
    assert difference.diagonal().min() > 1e-3, "the present does change"


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_a_padded_row_equals_the_unpadded_one(pattern, position):
    model, row, pad = build(pattern, position=possible(pattern, position)), tokens(1), 5
    batch = tokens(3, L + pad).roll(1, 0)
    batch[0, pad:], batch[1, :L] = row[0], row[0]  # padded on the left, on the right
    mask = torch.ones(3, L + pad, dtype=torch.bool)
    mask[0, :pad] = mask[1, L:] = False
    logits, alone = model(batch, padding_mask_BL=mask), model(row)
    close(logits[0, pad:], alone[0])
    close(logits[1, :L], alone[0])


def test_a_document_is_computed_as_if_it_were_alone(pattern):
    model, x, cuts = build(pattern), tokens(1), (0, 3, 4, 9, L)
    numbers = torch.tensor([[i for i in range(4) for _ in range(cuts[i], cuts[i + 1])]])
    alone = [model(x[:, a:b]) for a, b in pairwise(cuts)]
    together = model(x, documents_BL=numbers)
    close(together, torch.cat(alone, 1))
    expected = torch.autograd.grad(torch.cat(alone, 1).square().sum(), list(model.parameters()))
    got = torch.autograd.grad(together.square().sum(), list(model.parameters()))
    for local, peer in zip(got, expected, strict=True):
        torch.testing.assert_close(local, peer, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("position", POSITIONS)
def test_no_bit_of_a_document_reaches_another(pattern, position):
    """Neither a logit of another document nor the gradient of its loss depends on it; documents are
    shorter and longer than a chunk of the delta rule."""
    model = build(pattern, position=possible(pattern, position), max_sequence_length=160)
    lengths = torch.tensor([20, 1, 70, 49])
    documents = torch.arange(4).repeat_interleave(lengths)[None]
    x = tokens(1, documents.shape[1])
    for number in range(4):
        others = documents != number
        changed = torch.where(others, x, (x + 1) % V)
        results = []
        for row in (x, changed):
            logits = model(row, documents_BL=documents)[others]
            loss = logits.square().sum()
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            results.append([logits, *(g for g in grads if g is not None)])
        for before, after in zip(*results, strict=True):
            assert torch.equal(before, after)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 24, [7, 1, 1, 5, 10]], ids=["ones", "mixed"])
def test_reading_in_pieces_with_a_cache_equals_reading_whole(pattern, pieces):
    model, x = build(pattern), tokens(2, 24)
    cache = model.new_cache()
    got = [model(piece, cache=cache) for piece in x.split(pieces, 1)]
    close(torch.cat(got, 1), model(x))
    assert cache.length == 24


@pytest.mark.parametrize("mlp", ["swiglu", "moe"])
def test_selective_checkpointing_changes_no_bit(pattern, mlp):
    plain = build(pattern, mlp=mlp)
    again = build(pattern, mlp=mlp, activation_checkpointing="selective")
    again.load_state_dict(plain.state_dict())
    x, got = tokens(2), []
    numbers = torch.stack([(torch.arange(x.shape[1]) > 5).long(), torch.zeros_like(x[0])])
    for model, cuts in ((plain, None), (again, None), (plain, numbers), (again, numbers)):
        losses = model(x, x, documents_BL=cuts)
        total = losses[0].sum() + losses[1] if isinstance(losses, tuple) else losses.sum()
        got.append(torch.autograd.grad(total, [*model.parameters()], allow_unused=True))
    for pair in (got[:2], got[2:]):
        for a, b in zip(*pair, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_a_cache_is_read_where_layers_would_be_computed_again(pattern, kind):
    model, x, got = build(pattern, activation_checkpointing=kind), tokens(1), []
    cache = model.new_cache()
    for piece in x.split([7, 5], 1):  # with gradients
        got.append(model(piece, cache=cache))
    close(torch.cat(got, 1), model(x))
    _, weight = next(iter(model.blocks[0].mixer.named_parameters()))
    read, whole = (
        torch.autograd.grad(model(x, cache=cache).square().mean(), weight)[0]
        for cache in (model.new_cache(), None)
    )
    close(read, whole)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # said when oneDNN is switched off
def test_it_is_counted_as_it_is(pattern):
    config = small(pattern)
    model, x = build(pattern), tokens(2, 32)
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert list(shapes(config).items()) == list(named.items())
    assert count(config).total == sum(p.numel() for p in model.parameters())
    assert matrices(config) == model.muon_parameters()
    # The counter doesn't know oneDNN's LSTM, as it doesn't know the CPU's flash kernel.
    plain = torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH)
    with plain[0], plain[1], FlopCounterMode(display=False) as counter:
        model(x, x).sum().backward()
    spared = len(x) * sum(SPARED.get(mixer.kind, 0) for mixer in config.mixers)
    each = flops_per_token(config, 32) + flops_recomputed(config, 32)
    assert counter.get_total_flops() == each * x.numel() - spared
    assert flops_per_token(config, 32, causal=True) <= flops_per_token(config, 32)


@torch.no_grad()
def test_the_cache_takes_the_bytes_that_are_planned(pattern):
    model = build(pattern)
    cache = model.new_cache()
    model(tokens(1, 32), cache=cache)
    assert cache.num_bytes == cache_bytes(model.config, 32, 4)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # said when oneDNN is switched off
@pytest.mark.parametrize(
    ("dtype", "documents"), [(torch.float32, False), (torch.bfloat16, True)], ids=str
)
def test_autograd_keeps_the_bytes_that_are_counted(pattern, dtype, documents):
    """Within 3 %, on a CPU, at sizes at which a few numbers a row don't count."""
    sizes = dict(width=128, mlp_width=384, vocab_size=512, max_sequence_length=64)
    config = small(pattern, **sizes)
    counted = activations(config, 2, 64, dtype.itemsize, documents, fused_norms=False).saved
    assert saved_bytes(config, dtype, documents=documents) == pytest.approx(counted, rel=0.03)


@pytest.mark.slow  # seconds each
def test_it_compiles_as_one_graph(pattern):
    for name in BREAKS.keys() & set(pattern):
        pytest.skip(BREAKS[name])
    model, x = build(pattern).train(), tokens(2)
    assert_one_graph(model, lambda of: of(x, x).sum())
