"""`forescale export format=gguf`: what transformers' own reader of GGUF files, and llama.cpp where
its package xllamacpp is installed, compute with the file is what we compute."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from forescale import open_run
from forescale.ground.errors import UserError
from forescale.inference.gguf_export import vocabulary
from tests.trainer.inference import test_importing
from tests.trainer.inference.test_importing import CHAT, LLAMA_LIKE, TOKENS, model_of, write

pytest.importorskip("gguf", reason="needs pip install 'forescale[gguf]'")
transformers = pytest.importorskip("transformers")
TEXT = "It isn't  12345\n\n  def f(x):\n\tünï 漢字"


@pytest.fixture(autouse=True)
def mistral_in_own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mistral = LLAMA_LIKE | {"sliding_window": None}
    monkeypatch.setitem(test_importing.FAMILIES, "Mistral", mistral)


def exported(family: str, forescale, *words: str) -> Path:
    write(model_of(family), Path("there"))
    assert forescale("import", "hf", "there", "it")[0] == 0
    out = forescale.prints("export", "it", "format=gguf", "to=it.gguf", *words)
    assert "llama-cli -m it.gguf" in out
    return Path("it.gguf")


@pytest.mark.parametrize("family", ["Llama", "Llama 3.1", "Mistral", "Qwen2", "Qwen3"])
def test_transformers_computes_the_same_from_the_file(family, forescale):
    exported(family, forescale)
    # It doesn't read Llama 3.1's frequencies, nor the size of Qwen3's heads; import does.
    if family in ("Llama 3.1", "Qwen3"):
        forescale.prints("import", "it.gguf", "again")
        model = open_run("runs/again").model()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(".", gguf_file="it.gguf").eval()
    with torch.no_grad():
        logits = model(TOKENS)
        logits = getattr(logits, "logits", logits)
        expected = open_run("runs/it").model()(TOKENS)
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() < 1e-5


def test_the_tokenizer_comes_back_with_its_ends_and_template(forescale):
    exported("Llama", forescale, "dtype=bf16")
    forescale.prints("import", "it.gguf", "again")
    one, other = open_run("runs/it"), open_run("runs/again")
    assert one.ends == other.ends
    assert one.tokenizer.encode(TEXT).ids == other.tokenizer.encode(TEXT).ids
    small = other.run.read_imported()
    assert small["chat_template.jinja"] == CHAT
    expected = one.model().embedding.weight.detach().bfloat16().float()
    assert torch.equal(other.model().embedding.weight.detach().float(), expected)


def test_eight_bits_are_near(forescale):
    exported("Qwen2", forescale, "dtype=q8_0")
    full = Path("full.gguf")
    assert forescale("export", "it", "format=gguf", f"to={full}")[0] == 0
    assert Path("it.gguf").stat().st_size < 0.6 * full.stat().st_size
    forescale.prints("import", "it.gguf", "again")
    with torch.no_grad():
        near, exact = (open_run(f"runs/{name}").model()(TOKENS) for name in ("again", "it"))
    assert 0 < (near - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_splits_and_models_that_llama_cpp_does_not_know_are_refused(forescale):
    write(model_of("Olmo2"), Path("olmo"))
    assert forescale("import", "hf", "olmo", "olmo")[0] == 0
    err = forescale.refuses("export", "olmo", "format=gguf")
    assert "this model is olmo2" in err
    for i, pattern in enumerate(({"Regex": r"\d"}, {"String": "x"}, {"Regex": r"\p{N}"})):
        write(model_of("Llama"), Path(f"there{i}"))
        file = Path(f"there{i}/tokenizer.json")
        spec = json.loads(file.read_text())
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        parts = [split, byte_level | {"use_regex": False}]
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
        file.write_text(json.dumps(spec))
        assert forescale("import", "hf", f"there{i}", f"it{i}")[0] == 0
        err = forescale.refuses("export", f"it{i}", "format=gguf")
        assert "splits texts as no pre-tokenizer of llama.cpp" in err
    assert not list(Path("exports").glob("*"))
    assert "q8_0 exists only in GGUF files" in forescale.refuses("export", "it", "dtype=q8_0")


def test_pieces_are_read_with_a_space_before_them(forescale):
    """As the tokenizers of Llama 2 and Mistral are stored by transformers 5."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a"]
    numbers = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(numbers, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(pieces[:3])
    frame = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = frame
    config = {"vocab_size": len(pieces) + 1, "eos_token_id": [2, 262], "bos_token_id": None}
    keys = vocabulary(tokenizer, config, None)
    assert keys["ggml.model"] == "llama"
    assert keys["ggml.add_space_prefix"]
    assert keys["ggml.add_bos_token"]
    ids = {name: keys[f"ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "unknown")}
    assert ids == {"bos": 1, "eos": 2, "eot": 262, "unknown": 0}
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="has Whitespace, which llama"):
        vocabulary(tokenizer, config, None)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_llama_cpp_computes_what_we_compute(family, forescale):
    llama = pytest.importorskip("xllamacpp", reason="needs pip install xllamacpp")
    parameters = llama.CommonParams()
    parameters.model.path, parameters.n_ctx = str(exported(family, forescale)), 64
    server = llama.Server(parameters)
    with torch.no_grad():
        scores = open_run("runs/it").model()(TOKENS)[:, -1].log_softmax(-1)
    for prompt, score in zip(TOKENS.tolist(), scores, strict=True):
        request = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "n_probs": 1}
        [choice] = server.handle_completions(request)["choices"]
        first = choice["logprobs"]["content"][0]
        assert first["id"] == int(score.argmax())
        assert first["logprob"] == pytest.approx(float(score.max()), abs=5e-3)  # its cache is fp16
