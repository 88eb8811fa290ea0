"""`forescale import hf` of encoders and encoder-decoders: BERT, T5, and other classes."""

import json

import pytest
import torch
from tokenizers import AddedToken, SentencePieceUnigramTokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.processors import TemplateProcessing

from forescale import open_run
from forescale.config.train import TrainJob
from forescale.data.stream import StepShare, stream
from forescale.inference.question import question_of
from forescale.models.hf.any_class import AnyModel
from forescale.run.command import job_of
from forescale.run.start import start
from tests.models.hf.kinds import save_model
from tests.trainer.small_run import feed

transformers = pytest.importorskip("transformers")

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs!",
    "How vexingly quick daft zebras jump; sphinx of black quartz, judge my vow.",
]
SPECIAL = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Make a directory of a kind, with a tokenizer of its kind; return it and its model."""

    def folder_and_model(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        if kind == "bert":
            words = BertWordPieceTokenizer()
            words.train_from_iterator(TEXT * 9, vocab_size=120)
            words.save(str(folder / "words.json"))
            tokenizer = transformers.BertTokenizerFast(tokenizer_file=str(folder / "words.json"))
        else:
            pieces = SentencePieceUnigramTokenizer()
            special = ["<pad>", "</s>", "<unk>"]
            pieces.train_from_iterator(
                TEXT * 9, vocab_size=90, special_tokens=special, unk_token="<unk>"
            )
            pieces.post_processor = TemplateProcessing(
                single="$A </s>", special_tokens=[("</s>", 1)]
            )
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=pieces._tokenizer, **SPECIAL
            )
            if kind == "t5":  # whose ids count down
                names = [f"<extra_id_{i}>" for i in reversed(range(10))]
                tokenizer.add_tokens([AddedToken(n, special=True, normalized=False) for n in names])
        tokenizer.save_pretrained(folder)
        if kind == "bert":
            return folder, save_model(kind, folder, eos_token_id=None, bos_token_id=None)
        ids: dict = dict(eos_token_id=1, bos_token_id=2, pad_token_id=0, vocab_size=len(tokenizer))
        ids |= dict(decoder_start_token_id=1) if kind == "bart" else {}  # as published
        model = save_model(kind, folder, **ids)
        if kind == "bart":
            model.generation_config.forced_bos_token_id = 2
            model.generation_config.save_pretrained(folder)
        return folder, model

    return folder_and_model


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_it_answers_as_its_class_does(kind, folder_of, tmp_path, forescale):
    """With the tokens around a text, and the first of an answer; T5 is ours, BART its class."""
    folder, peer = folder_of(kind)
    out = forescale.prints("import", "hf", folder, "it", f"run.root={tmp_path}")
    assert "forescale finetune" in out
    assert "forescale eval" not in out
    run, tokenizer = tmp_path / "it", transformers.AutoTokenizer.from_pretrained(folder)
    module = open_run(run).model()
    assert isinstance(module, AnyModel) == (kind == "bart")
    assert f"{sum(p.numel() for p in module.parameters()):,} parameters" in out  # and no buffers
    text = "the quick box judges"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, -1] == 1
    output = peer.generate(ids, max_new_tokens=12, do_sample=False)[0]
    expected = tokenizer.decode([i for i in output if i > 2])  # without the first and the last
    options = ("temperature=0", f"num_tokens={12 - (kind == 'bart')}", "--json")
    answer = json.loads(forescale.prints("generate", run, f"prompt={text}", *options))
    assert len(expected) > 3
    assert answer["text"].strip() == expected.strip()

    forescale.prints("export", run, f"to={tmp_path / 'hf'}")
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").eval()
    x = torch.arange(3, 19)[None]
    with torch.no_grad():
        logits = [m(x, decoder_input_ids=x).logits for m in (peer, back)]
    torch.testing.assert_close(*logits)


def test_what_bart_learned_begins_as_in_training_in_its_export_too(folder_of, tmp_path, forescale):
    """Its own files would begin an answer with the end of a text, and a forced token."""
    folder, _ = folder_of("bart")
    forescale.prints("import", "hf", folder, "it", f"run.root={tmp_path}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the fox", "completion": "a box"}\n' * 4)
    words = [f"data={tmp_path / 'rows.jsonl'}", "run.name=tuned", f"run.root={tmp_path}"]
    words += ["train.steps=2", "train.global_batch=4", "train.micro_batch=4", "held_out=0"]
    words += ["optimizer.learning_rate=0.05", "train.sequence_length=32", "train.compile=off"]
    forescale.prints("finetune", tmp_path / "it", *words)
    forescale.prints("export", tmp_path / "tuned", f"to={tmp_path / 'hf'}")
    options = ("temperature=0", "num_tokens=6", "--json")
    answer = forescale.prints("generate", tmp_path / "tuned", "prompt=the fox", *options)
    back = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("the fox", return_tensors="pt").input_ids
    expected = tokenizer.decode(back.generate(ids, max_new_tokens=6)[0], skip_special_tokens=True)
    assert json.loads(answer)["text"].strip() == expected.strip() != ""
    assert back.generation_config.decoder_start_token_id == 0


def test_a_bert_with_other_parts_is_its_class(folder_of, tmp_path, forescale):
    folder, _ = folder_of("bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    forescale.prints("import", "hf", folder, "it", f"run.root={tmp_path}")
    peer, x = (
        transformers.AutoModelForMaskedLM.from_pretrained(folder).eval(),
        torch.arange(9)[None],
    )
    with torch.no_grad():
        torch.testing.assert_close(open_run(tmp_path / "it").model()(x), peer(x).logits)


@pytest.mark.parametrize("kind", ["RobertaForMaskedLM", "LEDForConditionalGeneration"])
def test_a_row_is_no_longer_than_the_table_of_positions(kind):
    cls = getattr(transformers, kind)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    longest = dict(max_position_embeddings=26)
    if kind.startswith("LED"):
        sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, attention_window=8)
        sizes |= dict(encoder_attention_heads=2, decoder_attention_heads=2)
        longest = dict(max_encoder_position_embeddings=24, max_decoder_position_embeddings=99)
    config = cls.config_class(vocab_size=50, **sizes, **longest).to_json_string()
    rows = dict(masked=kind.startswith("R"), split=0 if kind.startswith("R") else 1)
    assert AnyModel(config, vocab_size=50, sequence_length=2, **rows).longest == 24


def test_t5_learns_responses_as_transformers_computes_their_loss(folder_of, tmp_path, forescale):
    """From a file of examples; the tuned run reads a prompt as it was trained."""
    folder, peer = folder_of("t5")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    forescale.prints("import", "hf", folder, "it", f"run.root={tmp_path}")
    rows = [{"prompt": text[:20], "completion": text[20:29]} for text in TEXT]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [f"data={tmp_path / 'rows.jsonl'}", "run.name=tuned", f"run.root={tmp_path}"]
    words += ["train.steps=1", "train.global_batch=3", "train.micro_batch=3", "held_out=0"]
    words += ["train.sequence_length=256", "precision=fp32", "model.dropout=0"]
    words += ["train.compile=off"]
    forescale.prints("finetune", tmp_path / "it", *words)
    tuned = open_run(tmp_path / "tuned")
    nats = count = 0.0
    for row in rows:
        ids, labels = (tokenizer(text, return_tensors="pt").input_ids for text in row.values())
        with torch.no_grad():
            nats += peer(ids, labels=labels).loss.item() * labels.numel()
        count += labels.numel()
    assert tuned.metrics()["loss"].tolist() == pytest.approx([nats / count], rel=1e-5)
    question = question_of(tuned, "a box")
    assert (question.source, question.start) == (tokenizer("a box").input_ids, [0])
    words = [word.replace("tuned", "adapted") for word in words]
    forescale.prints("finetune", tmp_path / "it", *words, "lora.rank=2", "prepare_only=true")
    (tmp_path / "two.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    refused = forescale.refuses("finetune", tmp_path / "it", f"data={tmp_path / 'two.jsonl'}")
    assert "preferences are rows of a decoder" in refused


def test_t5_fills_in_spans_with_its_own_sentinels_and_goes_on_learning_them(
    folder_of, tmp_path, forescale
):
    folder, peer = folder_of("t5")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    forescale.prints("import", "hf", folder, "it", f"run.root={tmp_path}")
    text = "the quick <extra_id_0> box<extra_id_1>"
    question = question_of(open_run(tmp_path / "it"), text)
    assert question.source == tokenizer(text).input_ids
    assert question.names[tokenizer.convert_tokens_to_ids("<extra_id_1>")] == "<extra_id_1>"

    data = tmp_path / "data"
    (tmp_path / "words.txt").write_text("\n".join(TEXT * 30))
    forescale.prints("shards", tmp_path / "words.txt", f"output={data}", f"tokenizer={folder}")
    words = [f"run.from.run={tmp_path / 'it'}", "run.from.load=weights", "objective=seq2seq"]
    words += ["data=dataset", f"data.path={data}", f"run.root={tmp_path}", "run.name=on"]
    words += ["train.sequence_length=48", "train.global_batch=2", "train.micro_batch=2"]
    words += ["precision=fp32", "model.dropout=0", "train.compile=off", "train.steps=1"]
    forescale.prints("train", *words)
    view = open_run(tmp_path / "on")
    assert view.config.objective.around == [0, 1]
    assert view.config.model.vocab_size == len(tokenizer)
    split, share = view.config.model.source_length, StepShare(2, 2)
    (row,) = next(iter(stream(feed(tmp_path / "on"), share, range(1), 0, workers=0))).micro
    with torch.no_grad():
        loss = peer(row.tokens[:, :split], labels=row.targets[:, split:].contiguous()).loss.item()
    assert view.metrics()["loss"].tolist() == pytest.approx([loss], rel=1e-5)
    question = question_of(view, text)
    assert (question.source, question.start) == (tokenizer(text).input_ids, [0])
    forescale.prints("export", tmp_path / "on", f"to={tmp_path / 'hf'}")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(back) == len(tokenizer)
    for i in (999, -1):
        refused = forescale.refuses("train", *words, "run.name=x", f"objective.sentinels=[{i}]")
        assert f"{i} is no id of the tokenizer" in refused


def test_an_encoder_comes_in_with_its_mask_token(folder_of, tmp_path, forescale):
    """Which its training goes on with, on text in its own tokenizer, and which an export names."""
    folder, peer = folder_of("bert")
    out = forescale.prints("import", "hf", folder, "it", f"run.root={tmp_path}")
    assert "forescale generate" not in out
    view, tokenizer = open_run(tmp_path / "it"), transformers.AutoTokenizer.from_pretrained(folder)
    assert view.config.objective.mask_token == tokenizer.mask_token_id == 4
    x = torch.arange(5, 37)[None]
    with torch.no_grad():
        assert (view.model()(x) - peer(x).logits).abs().max() < 1e-5
    data = tmp_path / "data"
    (tmp_path / "words.txt").write_text("\n".join(TEXT * 30))
    forescale.prints("shards", tmp_path / "words.txt", f"output={data}", f"tokenizer={folder}")
    assert forescale("eval", tmp_path / "it", f"data.path={data}")[0] == 0
    words = [f"run.from.run={tmp_path / 'it'}", "run.from.load=weights", "objective=masked"]
    words += ["data=dataset", f"data.path={data}", f"run.root={tmp_path}", "run.name=on"]
    sizes = ["train.sequence_length=16", "train.global_batch=2", "train.micro_batch=2"]
    begun = start(job_of(TrainJob, [*words, *sizes, "train.steps=1"])).job
    assert (begun.objective.mask_token, begun.model.vocab_size) == (4, 300)  # no new id
    forescale.prints("export", tmp_path / "it", f"to={tmp_path / 'hf'}")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (again.mask_token, again.eos_token) == ("[MASK]", "[SEP]")
    assert "is no id of the tokenizer" in forescale.refuses(
        "train", "x", "objective=masked", "objective.mask_token=999", "model.causal=false",
        f"data.path={data}", "data=dataset", f"run.root={tmp_path}",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("t5", {"num_layers": 0}),  # a class of transformers without layers, as it were
        ("t5", {"num_layers": 10**12}),  # which would be built for hours
        ("t5", {"n_positions": "512"}),
        ("t5", {"dropout_rate": float("nan")}),
        ("t5", {"relative_attention_max_distance": 4, "relative_attention_num_buckets": 8}),
        ("t5", {"relative_attention_num_buckets": 2}),
        ("bert", {"num_hidden_layers": -4}),
    ],
)
def test_a_value_that_no_model_has_is_not_given_to_its_class(
    kind, change, folder_of, tmp_path, forescale
):
    folder, _ = folder_of(kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    code, _, err = forescale("import", "hf", folder, "it", f"run.root={tmp_path}")
    assert (code, err.count("\n")) == (2, 1), err
    assert next(iter(change)) in err
    assert "nothing was written" in err
    assert "as a class" not in err
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        ("bart", {"encoder_layers": 1}, "fewer layers than its files"),
        ("bart", {"decoder_layers": 0}, "fewer layers than its files"),
        ("bart", {"encoder_layers": 10**9}, "its encoder_layers is 1,000,000,000"),
        ("bart", {"encoder_ffn_dim": 31}, "other shapes than its weights"),
        ("t5", {"decoder_start_token_id": 10**9}, "no token of its tokenizer"),
        ("t5", {"decoder_start_token_id": "1"}, "no token of its tokenizer"),
        ("bart", {"forced_bos_token_id": -1}, "no token of its tokenizer"),
    ],
)
def test_a_config_that_its_files_contradict_is_refused(
    kind, change, problem, folder_of, tmp_path, forescale
):
    folder, _ = folder_of(kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    code, _, err = forescale("import", "hf", folder, "it", f"run.root={tmp_path}")
    assert (code, problem in err) == (2, True), err
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize("key", ["decoder_start_token_id", "forced_bos_token_id"])
def test_a_beginning_of_answers_that_is_no_token_is_refused(key, folder_of, tmp_path, forescale):
    folder, _ = folder_of("t5")
    (folder / "generation_config.json").write_text(json.dumps({key: 10**9}))
    code, _, err = forescale("import", "hf", folder, "it", f"run.root={tmp_path}")
    assert (code, err.count("\n")) == (2, 1), err
    assert f"generation_config.json: its {key} is 1000000000, no token of its tokenizer" in err
    assert not (tmp_path / "it").exists()


def test_answers_begin_as_in_generate_where_two_files_declare_two_beginnings(
    folder_of, tmp_path, forescale
):
    folder, _ = folder_of("t5")
    (folder / "generation_config.json").write_text('{"decoder_start_token_id": 5}')
    forescale.prints("import", "hf", folder, "it", f"run.root={tmp_path}")
    assert open_run(tmp_path / "it").config.objective.separator == "5"
