"""ALiBi's biases equal transformers' and the paper's formula."""

import pytest
import torch

from forescale.models import Transformer
from forescale.models.mixers import MIXERS, masks
from forescale.models.mixers.attention import Attention
from forescale.models.mixers.attention_module import _repeated, attend
from forescale.models.mixers.context import Columns
from forescale.models.mixers.masks import visible_keys
from forescale.models.parallel.groups import TensorGroup
from forescale.models.positions.biases import biased_mask, slopes
from forescale.models.positions.position import document_starts, positions_of
from tests.models.configs import model_config

HEADS = [1, 2, 3, 8, 12, 16, 20, 32, 71]


@pytest.mark.parametrize("num_heads", HEADS)
def test_biases_are_those_of_bloom(num_heads):
    """Bloom adds slope * key; a softmax doesn't change by the slope * query that we take off."""
    pytest.importorskip("transformers")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    peer = build_alibi_tensor(torch.ones(1, 24), num_heads, torch.float32)  # (H, 1, L)
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    local = biased_mask(torch.arange(24), None, num_heads, torch.float32)
    assert local.shape == (1, num_heads, 24, 24)
    expected = peer.expand(-1, 24, -1).masked_fill(~causal, -torch.inf)
    torch.testing.assert_close(local[0].softmax(-1), expected.softmax(-1), rtol=1e-5, atol=1e-7)


def test_distances_count_real_tokens_of_the_own_document():
    documents = torch.tensor([[3, 3, 3, 4, 4, 4]])
    padding = torch.tensor([[1, 0, 1, 1, 1, 1]])
    starts = document_starts(documents)
    positions = positions_of(6, documents.device, padding, starts)
    visible = visible_keys(padding, starts)
    mask = biased_mask(positions, visible, 1, torch.float32)[0, 0] * 256  # the slope of one head
    none = -torch.inf
    assert mask[2].tolist() == [-1, none, 0, none, none, none]
    assert mask[5].tolist() == [none, none, none, -2, -1, 0]


def test_a_bias_in_bf16_is_rounded_once():
    """Distances above 256 aren't exact in bf16."""
    exact = biased_mask(torch.arange(1000), None, 3, torch.float32)
    local = biased_mask(torch.arange(1000), None, 3, torch.bfloat16)
    assert torch.equal(local, exact.bfloat16())


def test_attention_is_the_papers_written_out():
    """softmax(q k / sqrt(K) - slope * distance) v, of grouped queries, in one layer."""
    torch.manual_seed(0)
    config = model_config(
        num_layers=1,
        width=24,
        num_heads=6,
        num_kv_heads=2,
        vocab_size=30,
        max_sequence_length=8,
        position="alibi",
        mixer__qk_norm="none",
        init_std=0.5,
    )
    model, tokens = Transformer(config), torch.randint(0, 30, (2, 8))
    mixer, visible = model.blocks[0].mixer, []
    mixer.register_forward_hook(lambda module, args, out: visible.append((args[0], out)))
    model(tokens)
    ((x, out),) = visible
    q, k, v = (
        f(x).view(2, 8, -1, 4).transpose(1, 2) for f in (mixer.query, mixer.key, mixer.value)
    )
    k, v = (part.repeat_interleave(3, 1) for part in (k, v))
    columns = torch.arange(8)
    distance = columns[:, None] - columns
    bias = torch.tensor(slopes(6))[:, None, None] * distance
    scores = (q @ k.transpose(-1, -2) / 2 - bias).masked_fill(distance < 0, -torch.inf)
    expected = mixer.output((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 8, 24))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_ranks_that_divide_heads_have_their_slopes_on_a_gpu(monkeypatch):
    monkeypatch.setattr(masks, "fits_flex", lambda columns: True)
    config = model_config(
        depth=2, width=96, num_heads=6, vocab_size=30, max_sequence_length=8, position="alibi"
    )
    columns = Columns(torch.arange(8), 8)
    mask = masks.full_mask(config, columns, True, None, (TensorGroup(1, 2, ""), None))
    torch.testing.assert_close(mask.slopes, torch.tensor(slopes(6)[3:]))


def test_repeated_heads_are_those_of_grouped_queries():
    q, k, v = (torch.randn(2, 5, heads, 4) for heads in (6, 2, 2))
    bias = torch.randn(1, 6, 5, 5)
    grouped = attend(q, k, v, bias, 0.5, True, 0.0, None)
    repeated = attend(q, *(_repeated(x, 3) for x in (k, v)), bias, 0.5, True, 0.0, None)
    torch.testing.assert_close(grouped, repeated, rtol=1e-5, atol=1e-6)


def test_a_mixer_that_adds_no_biases_is_refused(monkeypatch):
    other = type("Other", (Attention,), {"kind": "other", "takes_biases": False})
    monkeypatch.setitem(MIXERS, "other", other)
    (problem,) = model_config(depth=2, position="alibi", mixer="other").problems()
    assert problem[0] == "position"
    assert model_config(depth=2, position="rotary", mixer="other").problems() == []
