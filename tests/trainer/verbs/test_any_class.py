"""Every verb on a run of model=transformers. (The classes: models/hf; training: distributed.)"""

import json
import shutil

import pytest
import torch

from forescale import open_run
from forescale.config.compose import compose
from forescale.data.tokenizer import byte_tokenizer
from forescale.ground.errors import UserError
from forescale.inference.question import question_of
from forescale.run.start import start
from forescale.verbs.plan import Plan, PlanJob
from tests.models.hf.kinds import save_config, save_model
from tests.questions import rows, write_rows
from tests.trainer.small_run import make_job, make_run

transformers = pytest.importorskip("transformers")


def model_of(folder):
    return "model=transformers", f"model.name={folder}"


@pytest.fixture(scope="module")
def gemma(small_data, tmp_path_factory):
    """A run of a class, whose directory is gone."""
    folder = tmp_path_factory.mktemp("gemma")
    run = make_run(small_data, folder, "gemma", *model_of(save_config("gemma2", folder / "config")))
    shutil.rmtree(folder / "config")
    return run


def test_an_export_computes_the_same(gemma, tmp_path, forescale):
    assert "as Gemma2ForCausalLM" in forescale.prints("export", gemma.path, f"to={tmp_path / 'hf'}")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(open_run(gemma.path).model()(tokens), model(tokens).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    end = open_run(gemma.path).identity["dataset"]["end_of_text"]
    assert tokenizer.eos_token_id == model.config.eos_token_id == end
    assert forescale("export", gemma.path, f"to={tmp_path / 'bf'}", "dtype=bf16")[0] == 0
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf", dtype="auto")
    assert rounded.dtype == torch.bfloat16


def test_it_writes_and_is_scored_and_looked_into(gemma, tmp_path, forescale):
    words = ("generate", gemma.path, "prompt=def ", "num_tokens=9", "temperature=0")
    alone = forescale.prints(*words)
    texts = open_run(gemma.path).generate(["def ", "for name in", "x"], num_tokens=9, temperature=0)
    assert texts[0] in alone
    assert "perplexity" in forescale.prints("eval", gemma.path)
    page = tmp_path / "page.html"
    out = forescale.prints("inspect", gemma.path, "text=def main", "subject=main", f"to={page}")
    assert "tokens of the text" in out
    assert "Gemma2Attention" in page.read_text()


def test_its_config_is_frozen_with_it(gemma, small_data, tmp_path, forescale):
    assert json.loads(open_run(gemma.path).config.model.arguments["config"])["head_dim"] == 16
    branch = (f"run.from.run={gemma.path}", "run.from.load=weights", f"data.path={small_data}")
    branch = ("run.name=branch", f"run.root={tmp_path}", *branch, "train.sequence_length=32")
    assert "The model is a class of transformers" in forescale.prints("plan", *branch)
    out = forescale.prints("plan", *branch, "lora.rank=2", "optimizer=adamw", "--json")
    counts = json.loads(out)["parameters"]
    assert 0 < 10 * counts["trained adapters"] < counts["total"]
    words = (*model_of(save_config("phi", tmp_path / "phi")), "train.sequence_length=32")
    assert "a branch has the model of" in forescale.refuses("train", *branch, *words[:2])
    name = (f"run.name={gemma.path.name}", f"run.root={gemma.path.parent}")
    refused = forescale.refuses("train", *name, *words, "launch.processes=1")
    assert "model.config" in refused


def test_a_plan_counts_the_parameters_of_the_class(small_data, tmp_path):
    words = (*model_of(save_config("deepseek_v3", tmp_path)), "train.sequence_length=32")
    job = compose(PlanJob, [f"data.path={small_data}", *words, "plan.gpus=1"])
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert Plan(job).parameters == {"total": sum(p.numel() for p in model.parameters())}


REFUSED = {
    (): "model.name: is missing",
    ("model.name=nowhere",): "nowhere/config.json: no such file",
    ("model.name=.", "model.heads=4"): "unexpected keyword argument 'heads'",
    ("model.name=.", "model.activation_checkpointing=some"): "write none or full",
    ("model.name=.", "train.sequence_length=65"): "reads 64 tokens",
    ("model.name=.", "objective=masked"): "no class for masked tokens",
    (
        "model.name=.",
        "data.document_mask=true",
        "train.sequence_length=32",
    ): "can't keep the documents",
    ("model.name=.", "engine.tensor_parallel=2", "launch.processes=2"): "is not divided",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_it_cant_do_is_said_before_a_file_is_new_ids(
    words, small_data, tmp_path, monkeypatch, forescale
):
    monkeypatch.chdir(save_config("mamba", tmp_path, max_position_embeddings=64))
    data = ("launch.processes=1", f"data.path={small_data}", "run.name=new")
    assert REFUSED[words] in forescale.refuses("train", "model=transformers", *data, *words)
    assert not (tmp_path / "runs/new").exists()


def test_weights_as_pickles_alone_are_refused(small_data, tmp_path):
    folder = save_config("phi", tmp_path / "phi")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="as pickles"):
        start(make_job(small_data, tmp_path / "runs", "a", *model_of(folder)))


def test_weights_of_another_tokenizer_than_the_data_s_are_refused(small_data, tmp_path):
    save_model("phi", tmp_path / "phi", vocab_size=400)
    byte_tokenizer().save(str(tmp_path / "phi/tokenizer.json"))
    job = make_job(small_data, tmp_path / "runs", "a", *model_of(tmp_path / "phi"))
    with pytest.raises(UserError, match=r"with another tokenizer .* shards .* tokenizer="):
        start(job)
    assert not (tmp_path / "runs/a").exists()


def test_a_model_without_a_family_here_is_imported_as_its_class_and_fine_tuned(
    gemma, small_data, tmp_path, forescale
):
    saved = save_model("gemma2", tmp_path / "hf", vocab_size=400)
    shutil.copy(gemma.tokenizer, tmp_path / "hf/tokenizer.json")
    out = forescale.prints("import", "hf", tmp_path / "hf", "base", f"run.root={tmp_path}")
    assert "Gemma2ForCausalLM" in out
    shutil.rmtree(tmp_path / "hf")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(open_run(tmp_path / "base").model()(tokens), saved(tokens).logits)
    file = write_rows(tmp_path / "sums.jsonl", rows())
    words = (f"data={file}", f"run.root={tmp_path}", f"data.cache={tmp_path}", "prepare_only=true")
    assert forescale("finetune", tmp_path / "base", *words, "run.name=tuned")[0] == 0
    job = open_run(tmp_path / "tuned").config
    assert job.model == open_run(tmp_path / "base").config.model
    assert job.objective.kind == "responses"
    lora = (*words[:3], "run.name=low", "lora.rank=2", "launch.processes=1")
    code, _, err = forescale("finetune", tmp_path / "base", *lora, "lora.targets=[query]")
    assert code == 2
    assert "no linear layer of the class is 'query'; choose from q_proj, k_proj" in err
    assert forescale("export", tmp_path / "base", f"to={tmp_path / 'again'}")[0] == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(saved.state_dict()[n], w) for n, w in again.state_dict().items())


def test_a_masked_model_is_exported_with_its_card_and_gguf_is_refused(
    small_data, tmp_path, forescale
):
    folder = save_config("bert", tmp_path / "bert")
    run = make_run(small_data, tmp_path / "runs", "m", *model_of(folder), "objective=masked")
    command = ("export", run.path, f"to={tmp_path / 'hf'}")
    assert "a class of transformers" in forescale.refuses(*command, "format=gguf")
    assert "import AutoModelForMaskedLM" in forescale.prints(*command)
    assert "AutoModelForMaskedLM.from" in (tmp_path / "hf/README.md").read_text()
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").eval()
    assert model.config.vocab_size == 301  # the mask token is the last
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(open_run(run.path).model()(tokens), model(tokens).logits)
    assert "continues no text" in forescale.refuses("generate", run.path, "prompt=x")


def test_an_encoder_decoder_fills_gaps_and_is_exported(small_data, tmp_path, forescale):
    folder = save_config("t5", tmp_path / "t5")
    run = make_run(small_data, tmp_path, "two", *model_of(folder), "objective=seq2seq")
    text = "def <extra_id_0>x"
    words = ("generate", run.path, f"prompt={text}", "num_tokens=5", "temperature=0")
    assert "<extra_id_0>" in forescale.prints(*words)
    assert "int8: is for large matrices of forescale's own" in forescale.refuses(
        *words, "int8=true"
    )
    assert "objective=pairs" in forescale.refuses("finetune", run.path, "data=x.jsonl")
    out = forescale.prints("export", run.path, f"to={tmp_path / 'hf'}")
    assert "import AutoModelForSeq2SeqLM" in out
    assert "text2text-generation" in (tmp_path / "hf/README.md").read_text()
    exported = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").eval()
    question, model = question_of(open_run(run.path), text), open_run(run.path).model()
    assert exported.generation_config.decoder_start_token_id == question.start[0]
    # Several tokens: how a CPU rounds the product of a single row depends on the weights' address.
    source, start = torch.tensor([question.source]), torch.tensor([[*question.start, 5, 6, 7]])
    with torch.no_grad():
        expected = model(start, cache=model.encode(source))
        assert torch.equal(exported(source, decoder_input_ids=start).logits, expected)
