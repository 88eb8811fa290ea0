"""What is read in a class of transformers equals the class with its own weights set to zero."""

import json

import pytest
import torch
import transformers

from forescale.inspection import heads
from forescale.inspection.blocks import UnknownParts, blocks_of
from forescale.inspection.edits import token_losses
from forescale.inspection.interventions import ablate
from forescale.inspection.reading import read
from forescale.models.hf.any_class import AnyModel
from tests.models.hf.kinds import EXPERTS, GROUPED, SMALL
from tests.models.hf.test_any_class import any_model, tokens_of
from tests.trainer.inspection.test_numbers import close

# By kind: the matrices whose outputs the mixer and the MLP of a layer return.
MATRICES = {
    "mistral": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "falcon": ("transformer.h.{}.self_attention.dense", "transformer.h.{}.mlp.dense_4h_to_h"),
    "phi": ("model.layers.{}.self_attn.dense", "model.layers.{}.mlp.fc2"),
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "gemma2": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "qwen3_next": ("model.layers.{}.self_attn.o_proj", ""),
    "deepseek_v3": ("model.layers.{}.self_attn.o_proj", ""),
    "mamba": ("backbone.layers.{}.mixer.out_proj", ""),
}
WITH_MAPS = [kind for kind in MATRICES if kind not in ("mamba", "falcon")]


@pytest.mark.parametrize("kind", WITH_MAPS)
def test_maps_are_the_attentions_of_the_class_and_the_lens_ends_in_its_logits(kind):
    model, x = any_model(kind).eval(), tokens_of(1, 13)[0]
    maps, lens = heads.maps_of(model, x), heads.lens(model, x)
    with torch.no_grad():
        output = model.inner(x[None], output_attentions=True)
    expected = [weights for weights in output.attentions if weights is not None]
    assert len(maps) == len(expected)
    for weights, of_class in zip(maps.values(), expected, strict=True):
        close(weights, of_class[0])
    close(lens[-1], output.logits[0])
    assert not torch.allclose(lens[0], lens[-1])


@pytest.mark.parametrize("kind", MATRICES)
def test_a_part_or_a_head_without_its_matrix(kind):
    model, x = any_model(kind).eval(), tokens_of(1, 13)[0]
    result, layer = ablate(model, x), len(blocks_of(model)) - 1

    def without(columns, *names):
        """The change of the loss with this slice of matrices, and with their biases, at zero."""
        saved = {name: p.detach().clone() for name, p in model.named_parameters()}
        whole = token_losses(model(x[None]), x[None]).mean()
        for name in names:
            part = model.inner.get_submodule(name)
            weight = part.weight if type(part).__name__ == "Conv1D" else part.weight.T
            weight[columns] = 0
            if columns == slice(None) and part.bias is not None:
                part.bias.zero_()
        changed = token_losses(model(x[None]), x[None]).mean() - whole
        model.load_state_dict(saved, strict=False)
        return float(changed)

    mixer, mlp = (name.format(layer) for name in MATRICES[kind])
    with torch.no_grad():
        close(result.mixers[layer], without(slice(None), mixer))
        if mlp:
            close(result.mlps[layer], without(slice(None), mlp))
        if kind != "mamba":
            part = model.inner.get_submodule(mixer)
            size = part.weight.shape[type(part).__name__ != "Conv1D"] // 2
            # Before transformers 5.25, Falcon returned weights that it did not use: no heads.
            assert len(result.heads[layer]) in ((0, 2) if kind == "falcon" else (2,))
            for head, change in enumerate(result.heads[layer]):
                rows = slice(head * size, (head + 1) * size)
                close(change, without(rows, mixer))


def test_a_trace_goes_from_the_noise_back_to_the_clean_text():
    model, x = any_model("gemma2").eval(), tokens_of(1, 13)[0]
    trace = read(model, x.tolist(), subject=(2, 4)).trace
    assert [*trace.restored] == ["stream", "mixer", "mlp"]
    close(trace.restored["stream"][-1][-1], trace.clean)
    close(trace.restored["stream"][-1][:-1], [trace.corrupted] * 12)


@pytest.mark.parametrize("kind", ["bloom", "opt"])
def test_parts_that_a_class_does_not_add_have_no_number(kind):
    """BLOOM's parts return the stream itself, and OPT's MLP is no module."""
    reading = read(any_model(kind).eval(), tokens_of(1, 7)[0].tolist(), subject=(2, 4))
    assert reading.ablation.mixers == [None] * len(reading.layers)
    assert [*reading.trace.restored] == ["stream"]
    for layer in reading.layers:
        assert bool(layer.heads) == (kind == "opt")
        close(layer.maps.sum(-1), torch.ones(layer.maps.shape[:2]))


OTHERS = {
    # Its mixer ends with a norm of the stream, whose columns are no heads: those are before it.
    "bert": SMALL | dict(is_decoder=True),
    # Each of two groups has the values of two maps.
    "diffllama": GROUPED | dict(num_attention_heads=4, num_key_value_heads=2),
    # It returns a state where others return weights.
    "minimax": EXPERTS
    | dict(head_dim=16, num_local_experts=4, layer_types=["linear_attention", "full_attention"]),
    # Its blocks return lists.
    "openai-gpt": dict(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=300),
    # The number of rows must be the same in all blocks.
    "gpt_bigcode": dict(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=300),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_heads_are_those_that_read_by_their_own_map(kind):
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**OTHERS[kind])
    text = json.dumps(config.to_dict())
    model = AnyModel(text, vocab_size=300, sequence_length=24).eval()
    x = tokens_of(1, 7)[0]
    reading = read(model, x.tolist(), subject=(2, 4))
    heads_of_layers = {"diffllama": [0, 0], "minimax": [0, 2], "openai-gpt": [0, 0]}
    expected = heads_of_layers.get(kind, [2, 2])
    assert [len(layer.heads) for layer in reading.layers] == expected
    if kind == "bert":
        dense = model.inner.bert.encoder.layer[1].attention.output.dense
        whole = token_losses(model(x[None]), x[None]).mean()
        with torch.no_grad():
            dense.weight[:, :16] = 0
        changed = token_losses(model(x[None]), x[None]).mean() - whole
        close(reading.ablation.heads[1][0], float(changed))
    assert all(layer.maps.isfinite().all() and (layer.maps >= 0).all() for layer in reading.layers)


def test_a_class_that_calls_its_blocks_twice_is_refused():
    model = any_model("mistral").eval()
    layers = model.inner.model.layers
    block = layers[0].forward
    layers[0].forward = lambda x, *args, **kwargs: layers[1](block(x, *args, **kwargs), **kwargs)
    with pytest.raises(UnknownParts, match="doesn't call 2 blocks, each once"):
        blocks_of(model)


def test_a_class_whose_head_reads_more_than_the_last_stream_is_refused():
    """Its lens would mix the streams of two layers."""
    model, embedded = any_model("mistral").eval(), []
    inner = model.inner.model
    inner.embed_tokens.register_forward_hook(lambda m, x, y: embedded.append(y))
    inner.norm.register_forward_hook(lambda m, x, y: y + embedded[-1])
    with pytest.raises(UnknownParts, match="reads more than the last block's stream"):
        blocks_of(model)
