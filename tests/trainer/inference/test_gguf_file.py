"""`forescale import FILE.gguf`: the weights, the texts' ids and the ends of the file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from forescale import open_run
from forescale.data.tokenizer import byte_tokenizer
from forescale.inference.gguf_file import GgufFile
from forescale.models.hf.families import FAMILIES
from tests.trainer.inference.test_importing import CHAT, TOKENS, model_of, weights, write

gguf = pytest.importorskip("gguf", reason="needs pip install 'forescale[gguf]'")
transformers = pytest.importorskip("transformers")

ENDS = [260, 256, 258]  # of a text, a turn and a message
TEXT = "It isn't  12345\n\n  def f(x):\n\tünï <|eot|> 漢字"


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """A query or key in the order of llama.cpp (convert_hf_to_gguf.py, `permute`)."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def gguf_of(family: str, path: Path, kind: str = "F32", **keys) -> torch.nn.Module:
    """Write a random model as llama.cpp would have it; return it."""
    model, arch = model_of(family), family.split()[0].lower()
    config, writer = model.config, gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if arch != "qwen2" else 8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens = [*byte_tokenizer().get_vocab().items()]
    tokens = [t for t, _ in sorted(tokens, key=lambda one: one[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(keys.get("pre", "smollm"))
    writer.add_token_list([*tokens, "ab", "<|eom|>", "<b>", "<|eot|>"])
    writer.add_token_types([1] * 256 + [3, 1, 3, 4, 3])
    writer.add_token_merges(["a b"])
    for add, i in zip((writer.add_eos_token_id, writer.add_eot_token_id), ENDS, strict=False):
        add(i)
    writer.add_uint32("tokenizer.ggml.eom_token_id", ENDS[2])
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), 2)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            values = paired(values, 4 if "q_proj" in name else 2)
        whole = names.get_name(name, try_suffixes=(".weight", ".bias"))
        form = getattr(
            gguf.GGMLQuantizationType,
            kind if values.shape[-1] % 32 == 0 < values.ndim - 1 else "F32",
        )
        values = gguf.quants.quantize(values, form)
        writer.add_tensor(whole, values, raw_dtype=form)
    if "factors" in keys:
        writer.add_tensor("rope_freqs.weight", np.array(keys["factors"], np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return model


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_it_computes_what_its_source_computes(family, forescale):
    original = gguf_of(family, Path("it.gguf"))
    assert FAMILIES[family.lower()].architecture in forescale.prints("import", "it.gguf", "it")
    with torch.no_grad():
        assert (open_run("runs/it").model()(TOKENS) - original(TOKENS).logits).abs().max() < 1e-5
    assert forescale("export", "it", "to=back")[0] == 0
    write(original, Path("there"))
    before, after = weights(Path("there")), weights(Path("back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads(Path("back/generation_config.json").read_text())["eos_token_id"] == ENDS
    tokenizer = transformers.AutoTokenizer.from_pretrained("back")
    assert tokenizer.eos_token_id == ENDS[0]
    assert tokenizer.chat_template == CHAT
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert 259 not in tokenizer("ab").input_ids
    assert open_run("it.gguf").ends == open_run("runs/it").ends == ENDS


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_weights_are_those_of_the_file(kind, forescale):
    gguf_of("Llama", Path("it.gguf"), kind)
    expected = {t.name: t for t in gguf.GGUFReader("it.gguf").tensors}["token_embd.weight"]
    values = gguf.quants.dequantize(expected.data, expected.tensor_type)
    assert forescale("import", "it.gguf", "it")[0] == 0
    model = open_run("runs/it").model()
    assert np.array_equal(model.embedding.weight.detach().numpy(), values)


def test_the_scaled_frequencies_of_llama_3_are_recognised_and_others_refused(forescale):
    even = np.arange(0, 8, 2) / 8
    share = np.clip((8192 / (2 * np.pi) / 5e5**even - 1) / 3, 0, 1)
    gguf_of("Llama", Path("it.gguf"), factors=1 / ((1 - share) / 8 + share))
    scaling = GgufFile(Path("it.gguf")).config["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 8.0)
    assert forescale("import", "it.gguf", "it")[0] == 0
    gguf_of("Llama", Path("other.gguf"), factors=[1, 2, 3, 4])
    assert "rope_freqs.weight are not" in forescale.refuses("import", "other.gguf", "other")


def test_sentence_pieces_are_merged_as_transformers_merges_them():
    """Of pieces with scores, as Llama 2 and Mistral have them."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces = {"▁": -1e3, **{c: -1e3 - i for i, c in enumerate("abcdehlo")}}
    pieces |= {"he": -1.0, "lo": -2.0, "▁he": -3.0, "llo": -4.0, "el": -0.5, "hello": -5.0}
    writer = gguf.GGUFWriter("spm.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *pieces])
    writer.add_token_scores([0.0] * len(tokens) + [*pieces.values()])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(pieces))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens) + len(pieces), 8), np.float32))
    writer.add_embedding_length(8)
    writer.add_head_count(1)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    there = transformers.AutoTokenizer.from_pretrained(".", gguf_file="spm.gguf")
    raw = GgufFile(Path("spm.gguf")).tokenizer
    Path("tokenizer.json").write_bytes(raw)
    here = transformers.PreTrainedTokenizerFast(tokenizer_file="tokenizer.json")
    for text in ("hello hello", "a  b", "lloha é"):
        assert here(text).input_ids == there(text).input_ids, text
        assert here.decode(here(text).input_ids) == there.decode(there(text).input_ids)


@pytest.mark.parametrize("cut", [3, 40, 900, 20_000])
def test_a_damaged_file_is_refused(cut, forescale):
    gguf_of("Llama", Path("it.gguf"))
    Path("torn.gguf").write_bytes(Path("it.gguf").read_bytes()[:cut])
    assert "is no intact GGUF file" in forescale.refuses("import", "torn.gguf", "it")


def test_what_cant_be_imported_is_a_sentence(forescale, monkeypatch):
    gguf_of("Llama", Path("it.gguf"), pre="my-own")
    err = forescale.refuses("import", "it.gguf", "it")
    assert "its pre-tokenizer is 'my-own', not one of gpt-2" in err
    writer = gguf.GGUFWriter("bert.gguf", "bert")
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    assert "its architecture is 'bert'" in forescale.refuses("import", "bert.gguf", "it")
    assert "no such file" in forescale.refuses("import", "nowhere.gguf", "it").lower()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    err = forescale.refuses("import", "it.gguf", "it")
    assert "pip install 'forescale[gguf]'" in err
