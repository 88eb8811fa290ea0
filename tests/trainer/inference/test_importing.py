"""`forescale import hf`: it computes what transformers computes, and goes out as it came in."""

import json
import os
import signal
import struct
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from forescale import open_run
from forescale.config.train import TrainJob
from forescale.data.tokenizer import byte_tokenizer, vocabulary_of
from forescale.ground.errors import UserError
from forescale.ground.storage import write_checked_json
from forescale.inference.hf_directory import Stored
from forescale.inference.question import question_of
from forescale.models.hf.pieces import Piece
from forescale.monitor.status import runs_under
from forescale.run.command import job_of
from forescale.run.start import start
from tests.trainer.small_run import make_dataset

transformers = pytest.importorskip("transformers")

LLAMA_LIKE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=8,
    num_key_value_heads=2,
    intermediate_size=40,
    max_position_embeddings=64,
)
ROPE = {"rope_type": "llama3", "factor": 4.0, "rope_theta": 1e4}
ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=24)
FAMILIES = {
    "Llama": LLAMA_LIKE | dict(rope_theta=5e5, tie_word_embeddings=True),
    "Llama 3.1": LLAMA_LIKE | dict(rope_parameters=ROPE | {"original_max_position_embeddings": 24}),
    "Qwen2": LLAMA_LIKE | dict(rms_norm_eps=1e-5),
    "Qwen3": LLAMA_LIKE | dict(rms_norm_eps=1e-5, head_dim=12),
    "Olmo2": LLAMA_LIKE,
    "Mixtral": LLAMA_LIKE | dict(num_local_experts=3),
    "Qwen3Moe": LLAMA_LIKE | EXPERTS | dict(num_experts=5, mlp_only_layers=[0]),
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
TOKENS = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(0))
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def model_of(family: str) -> torch.nn.Module:
    """A random one of transformers', with numbers of its own in its config."""
    config = getattr(transformers, f"{family.split()[0]}Config")(
        vocab_size=261,
        bos_token_id=255,
        eos_token_id=256,
        initializer_range=0.3,
        **FAMILIES[family],
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("_proj.bias"):  # zeros, which would say nothing
            torch.nn.init.normal_(weight)
    return model


def write(model: torch.nn.Module, folder: Path, **how) -> Path:
    """The directory that save_pretrained makes, with a tokenizer of 257 tokens."""
    model.save_pretrained(folder, **how)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": CHAT}))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@pytest.fixture
def llama(tmp_path, monkeypatch) -> Path:
    """A directory of a Llama, in the directory of the test."""
    monkeypatch.chdir(tmp_path)
    return write(model_of("Llama"), Path("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_in_and_goes_out_as_it_was(family, tmp_path, forescale):
    """In several files, as large models are."""
    original = model_of(family)
    write(original, tmp_path / "there", max_shard_size="50KB")
    assert (tmp_path / "there/model.safetensors.index.json").exists()
    root = f"run.root={tmp_path}"
    out = forescale.prints("import", "hf", tmp_path / "there", "it", root)
    assert type(original).__name__ in out
    with torch.no_grad():
        logits, expected = open_run(tmp_path / "it").model()(TOKENS), original(TOKENS).logits
    assert expected.abs().max() > 1  # not a comparison of zeros
    assert (logits - expected).abs().max() < 1e-5

    assert forescale("check", tmp_path / "it")[0] == 0
    assert forescale("export", tmp_path / "it", f"to={tmp_path / 'back'}")[0] == 0
    before, after = weights(tmp_path / "there"), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("tokenizer_config.json", "generation_config.json"):
        one, other = (json.loads((tmp_path / d / name).read_text()) for d in ("there", "back"))
        assert one == other
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (
        tmp_path / "there/tokenizer.json"
    ).read_bytes()
    one, other = (
        transformers.AutoConfig.from_pretrained(tmp_path / d).to_dict() for d in ("there", "back")
    )
    written_by = ("_name_or_path", "transformers_version", "rope_theta", "rope_scaling")
    for key in one.keys() - {*written_by}:
        assert one[key] == other[key], key


def test_a_prompt_begins_as_the_tokenizer_of_the_weights_begins_texts(llama, forescale):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>"])
    first = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    tokenizer.save(str(llama / "tokenizer.json"))
    original = transformers.AutoTokenizer.from_pretrained(llama)
    assert forescale("import", "hf", llama, "it")[0] == 0
    for text in ("ab c", ""):
        assert question_of(open_run("runs/it"), text).start == original(text).input_ids, text
    assert original("").input_ids == [first]


def test_the_declared_end_is_written_taught_and_exported(llama, forescale):
    """Of a chat model whose vocabulary also has the usual name of the end of documents."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_end|>", "<|eot|>", "<|turn|>"])
    end, other = 257, 258
    tokenizer.save(str(llama / "tokenizer.json"))
    (llama / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    ids = json.dumps({"eos_token_id": [other, end]})
    (llama / "generation_config.json").write_text(ids)
    assert forescale("import", "hf", llama, "it")[0] == 0
    assert question_of(open_run("runs/it"), "a").end == end
    assert {*question_of(open_run("runs/it"), "a").other_ends} == {end, other, 256}
    for where in (llama, llama / "tokenizer.json", Path("runs/it/tokenizer.json")):
        assert vocabulary_of((llama / "tokenizer.json").read_bytes(), str(where)).end == end
    assert forescale("export", "it", "to=back")[0] == 0
    assert json.loads(Path("back/generation_config.json").read_text()) == json.loads(ids)

    assert forescale("import", "hf", llama, "own", "end_of_text=<|endoftext|>")[0] == 0
    assert forescale("export", "own", "to=taught")[0] == 0
    assert vocabulary_of((llama / "tokenizer.json").read_bytes(), "taught").end == 256
    # As if it had learned chats, whose turns end with another token.
    turn = "{% if m.role == 'assistant' %}<|turn|>{% endif %}"
    template = CHAT.replace("{% endfor %}", f"{turn}{{% endfor %}}")
    write_checked_json(Path("runs/own/chat.json"), {"chat_template": template})
    assert open_run("runs/own").ends == (ends := [256, 259, other, end])
    assert forescale("export", "own", "to=chat")[0] == 0
    for name in ("config.json", "generation_config.json"):
        assert json.loads(Path("chat", name).read_text())["eos_token_id"] == ends


def test_half_precision_stays_exact(llama, forescale):
    original = {name: t.bfloat16() for name, t in weights(llama).items()}
    save_file(original, llama / "model.safetensors")
    assert forescale("import", "hf", llama, "half")[0] == 0
    taken_tensor = open_run("runs/half").checkpoint()
    table = taken_tensor.tensor("embedding.weight")
    assert table.dtype == torch.float32
    assert torch.equal(table, original["model.embed_tokens.weight"].float())
    assert taken_tensor.size < 1.2 * (llama / "model.safetensors").stat().st_size
    assert forescale("export", "half", "to=back", "dtype=bf16")[0] == 0
    back = weights(Path("back"))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


def test_one_tensor_is_held_at_a_time(llama, monkeypatch, forescale):
    held, most, taken = [0], [0], Piece.taken

    def counted(self, source):
        tensor = taken(self, source)
        if tensor.device.type != "meta":
            held[0] += tensor.nbytes
            most[0] = max(most[0], held[0])
            weakref.finalize(
                tensor, lambda size: held.__setitem__(0, held[0] - size), tensor.nbytes
            )
        return tensor

    monkeypatch.setattr(Piece, "taken", counted)
    assert forescale("import", "hf", llama, "it")[0] == 0
    assert 0 < most[0] <= max(t.nbytes for t in weights(llama).values())


def test_a_kill_leaves_nothing_that_looks_like_a_run(llama, monkeypatch, forescale):
    read, count = Stored.read, [0]

    def killed(self):
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(Stored, "read", killed)
        forescale("import", "hf", llama, "it")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert runs_under(Path("runs")) == []
    assert any(Path("runs").iterdir())  # what it had written so far
    assert forescale("import", "hf", llama, "it")[0] == 0
    assert [path.name for path in Path("runs").iterdir()] == ["it"]


def changed(key, value):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))

    return change


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def weights_with(change):
    def rewrite(folder):
        tensors = weights(folder)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def torn(folder):
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-100])


def piped(name):
    def replace(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replace


def headed(tensors):
    """A file of weights without a byte of them."""

    def write_header(folder):
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        raw = json.dumps({f"{i}": empty for i in range(tensors)}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)

    return write_header


NORM = "model.norm.weight"
LONG = {"rope_type": "longrope", "factor": 8.0, "rope_theta": 1e4}
REFUSED = {
    "family": (changed("model_type", "x"), "config.json: its model_type is 'x', not one of"),
    "rope": (changed("rope_parameters", LONG), 'its rope_parameters.rope_type is "longrope"'),
    "blend": (
        changed("rope_parameters", ROPE | {"low_freq_factor": 2.0}),
        "its rope_parameters.low_freq_factor is 2.0",
    ),
    "part": (changed("partial_rotary_factor", 0.5), "its partial_rotary_factor is 0.5"),
    "window": (changed("layer_types", ["sliding_attention"] * 2), "its layer_types is"),
    "biases": (changed("attention_bias", True), "its attention_bias is true"),
    "quantised": (changed("quantization_config", {"bits": 4}), "its quantization_config is"),
    "key": (lambda folder: (folder / "config.json").write_text("{}"), "its model_type is None"),
    "kind": (changed("num_hidden_layers", "2"), 'its num_hidden_layers is "2", not a whole number'),
    "infinite": (
        changed("rms_norm_eps", float("inf")),
        "its rms_norm_eps is Infinity, not",
    ),
    "tiny": (changed("rms_norm_eps", 1e-300), "it gives model.norm.eps, which 1e-300 is too close"),
    "length": (changed("max_position_embeddings", 1e30), "its max_position_embeddings is 1e+30"),
    "true": (changed("max_position_embeddings", True), "its max_position_embeddings is true"),
    "tied": (changed("tie_word_embeddings", [1]), "its tie_word_embeddings is [1], not true or"),
    "negative": (changed("hidden_size", -32), "its hidden_size is -32, not a whole number"),
    "type": (changed("model_type", [1]), "its model_type is [1], not one of"),
    "rope type": (changed("rope_parameters", {"rope_theta": "x"}), 'its rope_theta is "x"'),
    "rope list": (changed("rope_parameters", [1]), "its rope_parameters is [1], not an object"),
    "deep": (
        lambda folder: (folder / "config.json").write_text("[" * 10**6),
        "config.json: not valid JSON",
    ),
    "pipe": (piped("generation_config.json"), "generation_config.json: is a pipe"),
    "weights pipe": (piped("model.safetensors"), "holds no model.safetensors"),
    "many": (headed(300_000), "holds more than 200,000 tensors"),
    "template": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "isn't UTF-8"),
    "pickle": (pickled, "in pickle files, which run code"),
    "weights": (without("model.safetensors"), "holds no model.safetensors"),
    "torn": (torn, "not a whole safetensors file"),
    "integers": (weights_with(lambda w: w.update({NORM: w[NORM].char()})), "is I8, not F32"),
    "missing": (weights_with(lambda w: w.pop(NORM)), f"the weight {NORM} is missing"),
    "unknown": (weights_with(lambda w: w.update(more=torch.ones(1))), "unexpected weight more"),
    "shape": (
        weights_with(lambda w: w.update({NORM: torch.ones(31)})),
        f"the weight {NORM} is [31], and [32] by config.json",
    ),
    "vocabulary": (weights_with(lambda w: None), "tokenizer has 257 tokens, the model 200"),
    "tokenizer": (without("tokenizer.json"), "holds no tokenizer.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cant_be_carried_is_named_and_nothing_is_written(case, llama, forescale):
    change, message = REFUSED[case]
    change(llama)
    if case == "vocabulary":
        changed("vocab_size", 200)(llama)
        name = "model.embed_tokens.weight"
        weights_with(lambda w: w.update({name: w[name][:200].clone()}))(llama)
    err = forescale.refuses("import", "hf", llama, "it")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


def test_the_words_of_the_command(llama, forescale):
    for words, message in (
        (["onnx"], "onnx: is no kind of model"),
        (["hf"], "path: is missing"),
        (["hf", llama], "run.name: is missing"),
        (["hf", "nowhere", "it"], "nowhere: no such directory"),
        (["hf", llama, "it", "tokeniser=x"], "tokenizer"),
    ):
        assert message in forescale.refuses("import", *words)
    out = forescale.prints("import", "hf", llama, "elsewhere/it", "--json")
    facts = json.loads(out)
    assert facts["path"] == "elsewhere/it"
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] == sum(p.numel() for p in model_of("Llama").parameters())
    err = forescale.refuses("import", "hf", llama, "elsewhere/it")
    assert "elsewhere/it: exists already" in err


def test_an_import_serves_every_verb(llama, forescale):
    """Generate, eval, status; and train and plan say how a run begins with it."""
    data = make_dataset(Path("data").absolute())
    tokenizer = data / "tokenizer.json"
    original = transformers.LlamaConfig(vocab_size=320, **FAMILIES["Llama"])
    transformers.LlamaForCausalLM(original).save_pretrained(llama)
    assert forescale("import", "hf", llama, "it", f"tokenizer={tokenizer}")[0] == 0
    assert forescale("generate", "it", "prompt=ab", "num_tokens=3")[0] == 0
    assert "bits per byte" in forescale.prints("eval", "it", f"data.path={data}")
    assert "give data.path=DIR" in forescale("eval", "it")[2]
    assert "runs/it: imported" in forescale("status", "it")[1]
    for verb in ("train", "plan"):
        err = forescale.refuses(verb, "it")
        assert "run.name=NEW run.from.run=runs/it run.from.load=weights" in err

    branch = ["run.name=new", "run.from.run=it", f"data.path={data}", "train.sequence_length=32"]
    branch += ["train.steps=4", "model.dropout=0.1"]
    with pytest.raises(UserError, match=r"write run\.from\.load=weights"):
        start(job_of(TrainJob, branch))
    begun = start(job_of(TrainJob, [*branch, "run.from.load=weights"]))
    imported = open_run("runs/it").config.model
    assert begun.job.model.width == imported.width == 32
    assert begun.job.model.vocab_size == 320
    assert begun.job.model.dropout == 0.1
    assert begun.run.imported.read_bytes() == Path("runs/it/imported.json").read_bytes()


def test_a_directory_is_taken_in_place_of_a_run_and_imported_once(llama, monkeypatch, forescale):
    monkeypatch.setenv("FORESCALE_CACHE", "cache")
    words = ("prompt=ab", "num_tokens=3", "temperature=0")
    code, first, err = forescale("generate", llama, *words)
    assert code == 0, err
    assert "is now the run" in err
    (run_folder,) = Path("cache/imported").iterdir()
    code, again, err = forescale("generate", llama, *words)
    assert (code, again) == (0, first)
    assert "is now the run" not in err
    assert forescale("import", "hf", llama, "named")[0] == 0
    assert forescale("generate", "named", *words)[1] == first

    weights_with(lambda w: w.update({NORM: w[NORM] * 0}))(llama)
    assert open_run(llama).path.parent != run_folder.absolute()
    assert f"make one: forescale import hf {llama} NAME" in forescale.refuses("status", llama)
