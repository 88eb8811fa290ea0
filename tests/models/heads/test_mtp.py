"""Later tokens are predicted as by MtpLayer of transformers, and never past a row or document."""

import pytest
import torch
import torch.nn.functional as F

from forescale.models import Transformer, hf
from forescale.models.heads.loss import IGNORE
from tests.models.configs import changed, model_config

L, V = 12, 61
BASE = model_config(
    num_layers=2,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=48,
    vocab_size=V,
    max_sequence_length=L,
    mtp_layers=2,
    init_std=0.2,
)
WEIGHT = BASE.mtp_weight


def build(config=BASE) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config)


def window(rows=3, seed=1):
    """Tokens and targets, (rows, L)."""
    ids = torch.randint(0, V, (rows, L + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def later_nats(model, *args, **named) -> list[float]:
    """The sum of nats of each module in one training forward pass."""
    model.train()
    model.counters().zero_()
    model(*args, **named)
    return (model.tallies.of("mtp")[:, 0].double() * 1e-6).tolist()


def test_the_modules_are_those_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    layers = pytest.importorskip("transformers.modeling_layers")

    model = build(changed(BASE, mixer__qk_norm="none")).train()
    for norm in (p for name, p in model.named_parameters() if "norm" in name):
        torch.nn.init.uniform_(norm, 0.5, 1.5)
    config, weights = hf.to_hf(model.config, model.state_dict())
    peer = llama.LlamaForCausalLM(llama.LlamaConfig(**config, attn_implementation="eager"))
    peer.load_state_dict(dict(weights))
    tokens, targets = window()
    x = peer.model(tokens).last_hidden_state
    embedded = peer.model.embed_tokens(tokens)
    position = torch.arange(L)[None]
    turn = peer.model.rotary_emb(x, position)
    mask = torch.full((L, L), -torch.inf).triu(1)[None, None]
    total = torch.zeros(())
    inner = hf.FAMILIES["llama"].inner
    for k, local in enumerate(model.mtp, 1):
        layer = layers.MtpLayer(peer.config, llama.LlamaDecoderLayer, llama.LlamaRMSNorm, 0)
        names = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "join": "eh_proj"}
        names |= {"norm": "post_norm"}
        names |= {f"block.{a}": f"mtp_block.{b}" for a, b in inner.items()}
        state = {
            f"{names[name.rpartition('.')[0]]}.weight": p for name, p in local.named_parameters()
        }
        layer.load_state_dict(state)
        # Columns whose later token is not in the row, are seen by no other.
        ahead = torch.cat([embedded[:, k:], torch.zeros_like(embedded[:, :k])], 1)
        x = layer(ahead, x, turn, mask, position, None)
        logits = peer.lm_head(x)[:, : L - k]
        total = total + F.cross_entropy(logits.flatten(0, 1), targets[:, k:].flatten()) * (
            targets[:, k:].numel()
        )
    losses, penalty = model(tokens, targets)
    plain = F.cross_entropy(peer(tokens).logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(losses.sum(), plain * targets.numel(), rtol=1e-5, atol=0)
    torch.testing.assert_close(penalty, WEIGHT / 2 * total, rtol=1e-5, atol=0)


def test_they_serve_training_alone():
    """Evaluation, logits and decoding are those of the model without them."""
    tokens, targets = window()
    model = build().eval()
    plain = Transformer(changed(BASE, mtp_layers=0)).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "mtp" not in k})
    assert torch.equal(model(tokens), plain(tokens))
    assert torch.equal(model(tokens, targets), plain(tokens, targets))
    assert torch.equal(model.train()(tokens, targets)[0], plain.train()(tokens, targets))


def test_they_train_themselves_and_the_model():
    tokens, targets = window()
    model = build()
    model(tokens, targets)[1].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_module_predicts_from_what_is_known_by_then():
    """A token changes what a module gives for no target before that of the token's own column."""
    tokens, targets = window(rows=1)
    model = build()
    for column in range(L):
        other = tokens.clone()
        other[0, column] = (other[0, column] + 1) % V
        for last in range(L):
            labels = torch.full_like(targets, IGNORE)
            labels[0, last] = targets[0, last]
            same = [
                a == pytest.approx(b, abs=2e-6)
                for a, b in zip(
                    later_nats(model, tokens, labels), later_nats(model, other, labels), strict=True
                )
            ]
            if column > last:
                assert same == [True, True]
            elif column == last >= 2:
                assert same == [False, False]


def test_documents_are_as_if_alone():
    model = build()
    rows, targets = window(rows=1)
    cut = 7
    documents = torch.tensor([[0] * cut + [1] * (L - cut)])
    # The last column of a document may have the next one's first token as its target.
    whole = later_nats(model, rows, targets, documents_BL=documents)
    parts = [
        later_nats(model, rows[:, part], targets[:, part])
        for part in (slice(0, cut), slice(cut, L))
    ]
    assert whole == pytest.approx([sum(got) for got in zip(*parts, strict=True)], rel=1e-5)


def test_what_a_step_reports():
    tokens, targets = window()
    model = build()
    assert model.metrics() == {}
    _, penalty = model(tokens, targets)
    model.counted(model.counters().clone())
    got = model.metrics()
    assert list(got) == ["mtp_loss_1", "mtp_loss_2"]
    sums = got["mtp_loss_1"] * 3 * (L - 1) + got["mtp_loss_2"] * 3 * (L - 2)
    assert penalty.item() == pytest.approx((WEIGHT / 2 * sums).item(), rel=1e-6)


@pytest.mark.parametrize(
    "keys",
    [
        dict(activation_checkpointing="full"),
        dict(tie_embeddings=True, position="learned", norm="layernorm", bias=True),
        dict(norm__placement="residual", head="dense"),
        dict(mixer="window", mixer__window=4),
        dict(mixer_pattern=["mingru", "attention"]),
        dict(mixer="gated_deltanet"),
        dict(mixer="latent", position="alibi"),
    ],
    ids=str,
)
def test_other_choices_go_with_them(keys):
    tokens, targets = window()
    model = build(changed(BASE, **keys))
    losses, penalty = model(tokens, targets)
    (losses.sum() + penalty).backward()
    same = build(changed(BASE, **keys | dict(activation_checkpointing="none")))
    others, other = same(tokens, targets)
    (others.sum() + other).backward()
    assert torch.equal(penalty, other)
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_with_experts_their_layers_count_too():
    config = changed(BASE, mlp="moe", mlp__experts=4, mlp__scores="sigmoid", mlp__bias_speed=0.01)
    model = build(config)
    tokens, targets = window()
    model(tokens, targets)
    pairs = model.tallies.of("experts")[:, :4].sum(-1) // 2
    assert pairs.tolist() == [3 * L, 3 * L, 3 * (L - 1), 3 * (L - 2)]
    model.counted(model.counters().clone())
    before = [module.block.mlp.bias_steps.clone() for module in model.mtp]
    model.updated()
    assert all((m.block.mlp.bias_steps != b).any() for m, b in zip(model.mtp, before, strict=True))
