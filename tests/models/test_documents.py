"""Documents side by side in a row: none learns of another, and each is as if it were alone."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from forescale.models import ModelConfig, Transformer
from forescale.models.mixers.masks import visible_keys
from forescale.models.positions.kinds import POSITIONS
from forescale.models.positions.position import document_starts, positions_of
from tests.matrix import full_only
from tests.models.variants import VARIANTS, L, V, build, named, tokens

SOME = VARIANTS
LENGTHS = (4, 1, 7)  # of the documents of a row of L tokens
IGNORE = -100


def numbers(lengths=LENGTHS, first=0):
    """(1, sum of lengths): the number of each token's document."""
    return torch.arange(first, first + len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


def within(documents):
    """Targets of a row: the next token of the same document."""

    def of(x):
        last = documents.diff(dim=-1, append=documents[:, -1:] + 1) != 0
        return x.roll(-1, 1).masked_fill(last, IGNORE)

    return of


def gradients(model, losses):
    return torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("variant", SOME, ids=named)
def test_each_document_is_as_if_alone(variant):
    """Its logits, its loss and the gradient of its loss; with padding on both sides of the row, and
    between two documents."""
    model = build(*variant)
    alone = [tokens(1, L)[:, :4], tokens(1, L)[:, 4:5], tokens(1, L)[:, 5:]]
    junk = tokens(2, L)[1:]
    packed = torch.cat(alone, 1)
    padded = torch.cat((junk[:, :2], *alone[:2], junk[:, :1], alone[2], junk[:, :2]), 1)
    mask = torch.tensor([[0] * 2 + [1] * 5 + [0] + [1] * 7 + [0] * 2])
    documents, around = numbers(), numbers((6, 2, 9), first=-1)
    assert around[mask.bool()].tolist() == (documents[0] - 1).tolist()
    padded_targets = padded.clone()
    padded_targets[mask.bool()] = within(documents)(packed)
    padded_targets[mask == 0] = IGNORE
    expected = torch.cat([model(row) for row in alone], 1)[0]
    of_alone = [
        gradients(model, model(row, within(torch.zeros_like(row))(row)))
        for row in (alone[0], alone[2])
    ]
    expected_gradients = [a + b for a, b in zip(*of_alone, strict=True)]
    for row, targets, padding, of in (
        (packed, within(documents)(packed), None, documents),
        (padded, padded_targets, mask, around.int()),
    ):
        logits = model(row, padding_mask_BL=padding, documents_BL=of)
        real = logits[0] if padding is None else logits[padding.bool()]
        torch.testing.assert_close(real, expected, rtol=1e-5, atol=1e-5)
        got = gradients(model, model(row, targets, padding, of))
        for local, peer in zip(got, expected_gradients, strict=True):
            torch.testing.assert_close(local, peer, rtol=1e-3, atol=1e-4)


def test_what_is_seen_and_where_tokens_stand():
    documents = torch.tensor([[3, 3, 4, 9, 9, 9]])
    starts = document_starts(documents)
    assert starts.tolist() == [[0, 0, 2, 3, 3, 3]]
    assert positions_of(6, documents.device, None, starts).tolist() == [[0, 1, 0, 0, 1, 2]]
    assert visible_keys(None, starts)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    mask = torch.tensor([[0, 1, 1, 0, 1, 1]])
    real = positions_of(6, documents.device, mask, starts)[mask.bool()]
    assert real.tolist() == [0, 0, 0, 1]
    visible = visible_keys(mask, starts)[0, 0].int()
    assert visible[5].tolist() == [0, 0, 0, 0, 1, 1]
    assert visible.diagonal().tolist() == [1] * 6


def test_a_document_longer_than_a_kernel_s_block_stays_apart():
    """Attention's kernels work on blocks of 512 keys and fewer; whole blocks are unseen here."""
    length, lengths = 1300, (700, 3, 597)
    model = build("rotary", "rmsnorm", "swiglu", "head", 1, max_sequence_length=length)
    x, documents = tokens(1, length), numbers(lengths)
    with torch.no_grad():
        logits = model(x, documents_BL=documents)
        other = torch.where(documents == 0, (x + 1) % V, x)
        difference = (model(other, documents_BL=documents) - logits).abs().amax(-1)
        assert difference[:, 700:].max() == 0
        torch.testing.assert_close(logits[:, 703:], model(x[:, 703:]), rtol=1e-5, atol=1e-5)


SMALL = ModelConfig(
    num_layers=3, width=32, num_heads=4, num_kv_heads=2, vocab_size=V, max_sequence_length=L
)


def trained_once(model, run, x):
    """The losses and all gradients of `run`, which is the model or what was made of it."""
    model.zero_grad()
    mask = torch.ones_like(x)
    mask[0, :2] = 0
    documents = numbers().expand(len(x), -1)
    losses = run(x, within(documents)(x).masked_fill(mask == 0, IGNORE), mask, documents)
    losses.sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "change",
    [
        {"position": "learned", "norm": "layernorm", "activation_checkpointing": "full"},
        pytest.param({}, marks=full_only),
    ],
)
def test_compiles_as_one_graph(change, backend):
    """aot_eager needs no C++ compiler; inductor is what a training compiles with."""
    torch._dynamo.reset()
    model, x = Transformer(replace(SMALL, num_layers=1, **change)), tokens(3, L)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for local, peer in zip(
        trained_once(model, compiled, x), trained_once(model, model, x), strict=True
    ):
        torch.testing.assert_close(local, peer, rtol=1e-4, atol=1e-4)
    documents = numbers().expand(3, -1)
    other = torch.where(documents == 1, (x + 1) % V, x)
    logits, changed = (compiled(row, documents_BL=documents) for row in (x, other))
    assert torch.equal(logits[documents != 1], changed[documents != 1])
    assert not torch.equal(logits[documents == 1], changed[documents == 1])


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        built = func(*args, **(kwargs or {}))
        flat = built if isinstance(built, tuple | list) else [built]
        self.seen += [t.shape for t in flat if isinstance(t, torch.Tensor)]
        return built


@pytest.mark.parametrize("position", POSITIONS)
def test_without_documents_nothing_is_paid_for_them(position):
    """No mask of L by L is made, so that attention may take its causal kernels; positions are one
    row for the batch. Biases of scores need a mask, but one for all rows."""
    model, x = Transformer(replace(SMALL, position=position)), tokens(3, L)
    with Shapes() as plain:
        model(x, x).sum().backward()
    with Shapes() as masked:
        model(x, x, documents_BL=numbers().expand(3, -1))
    squares = [shape for shape in plain.seen if shape[-2:] == (L, L)]
    assert bool(squares) == (position in ("alibi", "relative"))
    if position != "relative":  # whose scores are made, for no flash kernel takes its biases
        assert not [shape for shape in squares if shape[0] == 3]
    assert (3, L) not in plain.seen[: plain.seen.index((3, L, 32))]  # the embedded tokens
    assert [shape for shape in masked.seen if shape[-2:] == (L, L)]


@pytest.mark.parametrize("position", POSITIONS)
def test_all_in_bf16_stays_close_to_fp32(position):
    torch.manual_seed(0)
    model, x = Transformer(replace(SMALL, position=position)), tokens(3, L)
    expected = trained_once(model, model, x)[0]
    losses, *got = trained_once(model.bfloat16(), model, x)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=5e-3, atol=0)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in got)
    logits = model(x, documents_BL=numbers().expand(3, -1))
    other = torch.where(numbers() == 0, (x + 1) % V, x)
    changed = model(other, documents_BL=numbers().expand(3, -1))
    assert torch.equal(changed[:, 4:], logits[:, 4:])
    assert not torch.equal(changed[:, :4], logits[:, :4])


def test_autocast_takes_the_same_mask():
    model, x = Transformer(SMALL), tokens(3, L)
    expected = trained_once(model, model, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        losses = trained_once(model, model, x)[0]
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=0)
