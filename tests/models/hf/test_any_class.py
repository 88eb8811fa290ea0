"""Any class of transformers as a model: the class itself is the oracle."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from forescale.models.decoding.batch import Batch, Choice, generate
from forescale.models.decoding.sampler import Sampler
from forescale.models.hf.any_class import AnyModel
from tests.models.hf.kinds import KINDS, TWO_PARTS, config_of, save_model

transformers = pytest.importorskip("transformers")

DECODERS = [kind for kind in KINDS if kind not in ("bert", *TWO_PARTS)]
# The others have ALiBi, a recurrence, or a window without documents.
APART = ["mistral", "phi", "falcon", "gpt_neox", "gpt2", "opt", "gemma2", "olmoe", "deepseek_v3"]
ALONE = ["qwen3_next", "mamba", "recurrent_gemma"]  # with a state of their own
LENGTH = 24


def any_model(kind, seed=0, vocab_size=300, **options):
    text = json.dumps(config_of(kind).to_dict())
    torch.manual_seed(seed)
    masked = options.pop("masked", kind == "bert")
    sizes = dict(vocab_size=vocab_size, sequence_length=LENGTH, masked=masked)
    return AnyModel(text, **sizes, **options)


def tokens_of(rows=2, length=LENGTH, seed=0):
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_weights_that_were_read_are_trained_with_dropout(tmp_path):
    """Else a resume, which reads none, would be another training."""
    save_model("opt", tmp_path, dropout=0.5)
    text = (tmp_path / "config.json").read_text()
    model = AnyModel(text, str(tmp_path), True, vocab_size=300, sequence_length=16)
    assert all(module.training for module in model.modules())
    tokens = torch.arange(16)[None]
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("kind", [*DECODERS, "bert"])
def test_its_losses_are_of_the_logits_of_the_class_and_its_gradients_reach_all(kind):
    model, tokens = any_model(kind), tokens_of()
    tokens[0, 3] = 1  # their id for padding, which is text here
    targets = tokens.roll(-1, 1)
    targets[:, -5:] = -100
    logits = model.eval().inner(input_ids=tokens).logits
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
    assert (model(tokens, targets) - expected).abs().max() < 1e-5 * expected.max()
    output = model.train()(tokens, targets)
    losses, penalty = output if isinstance(output, tuple) else (output, 0.0)
    assert (float(torch.as_tensor(penalty).detach()) > 0) == (kind == "olmoe")
    (losses.sum() + penalty).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert model.inner.get_input_embeddings().weight.grad[1].any()
    muon = model.muon_parameters()
    assert muon
    assert not any("embed" in name or "lm_head" in name for name in muon)


@pytest.mark.parametrize("kind", DECODERS)
def test_it_writes_as_the_class_does_with_its_cache(kind):
    model, prompt = any_model(kind).eval(), tokens_of(rows=1, length=7)
    text = generate(model, prompt, 12, Sampler(temperature=0.0))
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(text, model.inner.generate(prompt, **options))
    beyond = generate(model, prompt, 20, Sampler(temperature=0.0), max_context=10)
    assert torch.equal(beyond[:, :10], text[:, :10])
    assert beyond.shape == (1, 27)


@pytest.mark.parametrize("kind", DECODERS)
def test_rows_of_a_batch_are_continued_as_alone_or_not_put_together(kind):
    model = any_model(kind).eval()
    assert model.takes_padding == (kind not in ALONE)
    if kind in ALONE:
        return
    prompts, options = tokens_of(rows=3, length=9), dict(sampler=Sampler(temperature=0.0))
    sizes = (4, 9, 6)
    for row, size in zip(prompts, sizes, strict=True):
        row[: 9 - size] = 0
    real = torch.arange(9)[None] >= 9 - torch.tensor(sizes)[:, None]
    choice = Choice([options["sampler"]] * 3, [torch.Generator()] * 3)
    with torch.inference_mode():
        batch = Batch(model, prompts, choice, None, real, num_tokens=12)
        for step in range(12):
            batch.step()
            if step == 3:
                batch.keep([2, 0])
    for text, i in zip(batch.tokens, (2, 0), strict=True):
        alone = generate(model, prompts[i : i + 1, 9 - sizes[i] :], 12, **options)[0]
        assert torch.equal(text[-len(alone) :], alone)


@pytest.mark.parametrize("kind", DECODERS)
def test_documents_are_kept_apart_or_refused(kind):
    if kind not in APART:
        with pytest.raises(ValueError, match="can't keep the documents of a window apart"):
            any_model(kind, documents=True)
        return
    model, tokens = any_model(kind, documents=True).eval(), tokens_of()
    documents = torch.arange(LENGTH)[None].expand(2, -1) // 10
    with torch.no_grad():
        logits = model(tokens, documents_BL=documents)
        parts = torch.cat([model(part) for part in tokens.split(10, 1)], 1)
        whole = model(tokens)
    assert (logits - parts).abs().max() < 1e-4
    assert (logits - whole).abs().max() > 1e-2


def test_an_encoder_of_masked_tokens_sees_both_sides_but_no_padding_and_no_other_document():
    model, tokens = any_model("bert", documents=True).eval(), tokens_of()
    real = torch.arange(LENGTH)[None].expand(2, -1) < 18
    with torch.no_grad():
        short, padded = model(tokens[:, :18]), model(tokens, padding_mask_BL=real)
        documents = (torch.arange(LENGTH)[None] // 18).expand(2, -1)
        apart, changed = model(tokens, documents_BL=documents), model(tokens.roll(1, 0))
    assert (padded[:, :18] - short).abs().max() < 1e-4
    assert (apart[:, :18] - short).abs().max() < 1e-4
    assert (changed[0, 0] - model(tokens)[0, 0]).abs().max() > 1e-2


def test_weights_of_a_directory_are_read_and_more_ids_are_added(tmp_path):
    saved, tokens = save_model("gemma2", tmp_path), tokens_of()
    options = dict(name=str(tmp_path), weights=True)
    with torch.no_grad():
        expected = saved(tokens).logits
        assert torch.equal(any_model("gemma2", **options).eval()(tokens), expected)
        larger = any_model("gemma2", vocab_size=301, **options).eval()(tokens)
        assert larger.shape[2] == 301
        assert (larger[..., :300] - expected).abs().max() < 1e-5
        assert not torch.equal(any_model("gemma2", **options, draws=False)(tokens), expected)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="can't build it"):
        any_model("gemma2", **options)


def test_its_rotations_stay_exact_in_bf16():
    model = any_model("mistral")
    exact = model.inner.model.rotary_emb.inv_freq.clone()
    assert torch.equal(model.bfloat16().inner.model.rotary_emb.inv_freq, exact)
    assert model.inner.lm_head.weight.dtype == torch.bfloat16


def test_what_names_code_or_kernels_elsewhere_is_not_read():
    values = config_of("mistral").to_dict()
    values |= dict(_attn_implementation="kernels-community/x", quantization_config={"bits": 4})
    values |= dict(auto_map={"AutoModelForCausalLM": "modeling.Model"})
    inner = AnyModel(json.dumps(values), vocab_size=300, sequence_length=8).inner
    assert type(inner) is transformers.MistralForCausalLM
    assert inner.config._attn_implementation == "sdpa"
    assert not hasattr(inner.config, "quantization_config")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mine", "auto_map": {"AutoConfig": "x.Y"}}, "doesn't know, and code that"),
        ({"model_type": "t5"}, "an encoder and a decoder"),
        ({"model_type": "bert"}, "sees later tokens; write objective=masked"),
        ({"model_type": "vit"}, "continues no text"),
        ({"model_type": "mistral", "masked": True}, "no class for masked tokens"),
        ({"model_type": "mistral", "hidden_size": "x"}, "transformers can't build it"),
        ({"model_type": "mistral", "max_position_embeddings": 7}, "reads 7 tokens, and train"),
    ],
)
def test_other_classes_are_refused_in_a_sentence(values, message):
    masked = bool(values.pop("masked", False))
    with pytest.raises(ValueError, match=message) as caught:
        AnyModel(json.dumps(values), vocab_size=300, sequence_length=8, masked=masked)
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", TWO_PARTS)
def test_an_encoder_reads_the_source_and_the_decoder_writes_the_target(kind):
    """Rows as those of objective=pairs: the source ends at column 9, its padding is before it."""
    model, rows = any_model(kind, split=10).eval(), tokens_of()
    real = torch.arange(LENGTH)[None] >= torch.tensor([[3], [0]])
    targets = rows.roll(-1, 1)
    targets[:, :10] = targets[:, -2:] = -100
    with torch.no_grad():
        for row, first, loss in zip(rows, (3, 0), model(rows, targets, real), strict=True):
            source, labels = row[None, first:10], targets[:1, 10:]
            labels = row.roll(-1)[None, 10:].clone()
            labels[:, -2:] = -100
            output = model.inner(input_ids=source, decoder_input_ids=row[None, 10:], labels=labels)
            expected = output.loss * (labels != -100).sum()
            assert abs(loss - expected) < 1e-5 * expected


@pytest.mark.parametrize("kind", TWO_PARTS)
def test_its_flops_are_those_of_its_products(kind):
    """But for the scores of attention; tables of positions count as matrices."""
    model = any_model(kind, split=14)
    rows = tokens_of(rows=1)
    with FlopCounterMode(display=False) as counter:
        model(rows, rows.roll(-1, 1)).sum().backward()
    assert model.flops_per_token(LENGTH) * LENGTH == pytest.approx(
        counter.get_total_flops(), rel=0.2
    )


@pytest.mark.parametrize("kind", TWO_PARTS)
def test_answers_of_a_batch_of_sources_are_those_that_the_class_writes(kind):
    model, sources = any_model(kind, split=10).eval(), tokens_of(length=10)
    real = torch.arange(10)[None] >= torch.tensor([[4], [0]])
    greedy, start = Sampler(temperature=0.0), torch.full((2, 1), 7)
    choice = Choice([greedy] * 2, [torch.Generator()] * 2)
    with torch.inference_mode():
        batch = Batch(model, start, choice, 20, None, sources, real, num_tokens=9)
        for step in range(9):
            batch.step()
            if step == 4:
                batch.keep([1, 0])
    for text, source in zip(batch.tokens, (sources[1:], sources[:1, 4:]), strict=True):
        options = dict(max_new_tokens=9, do_sample=False, eos_token_id=None)
        alone = model.inner.generate(source, decoder_start_token_id=7, **options)
        assert torch.equal(text, alone[0])


def test_two_parts_need_a_source_and_one_part_takes_rows_with_one():
    with pytest.raises(ValueError, match=r"need a source and a target; .* objective=seq2seq"):
        any_model("t5")
    assert any_model("mistral", split=10).split == 0
    with pytest.raises(ValueError, match="has no encoder"):
        any_model("mistral").encode(tokens_of())
