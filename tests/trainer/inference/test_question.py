"""Spans that a text lacks, and the rest of one, by a decoder alone and by an encoder-decoder."""

from dataclasses import replace

import pytest
import torch

from forescale import open_run
from forescale.config.schema import TargetConfig
from forescale.data.conversations.template import ChatTemplate
from forescale.data.stream import StepShare, stream
from forescale.data.tokenizer import byte_tokenizer
from forescale.ground.errors import UserError
from forescale.inference import summary
from forescale.inference.generation import Answer, GenerationConfig, pieces
from forescale.inference.question import chat_question, question_of
from forescale.models import Transformer
from forescale.models.decoding.sampler import Sampler
from forescale.run.start import start
from forescale.train.model import build_model
from forescale.verbs.generate import main as generate
from tests.reversed_words import KIND, make_pairs
from tests.trainer.small_run import LENGTH, feed, make_job, make_run

SMALL = ["model.num_layers=1", "model.width=32", "model.num_heads=2", "model.init_std=0.3"]
# 4 spans a window, in 24 + 8 columns.
WORDS = [*SMALL, "objective=seq2seq", "objective.mean=1"]
TEXT = "def <extra_id_0>(x):\n    return <extra_id_1>"


@pytest.fixture(scope="module", params=[0, 2], ids=["decoder", "encoder-decoder"])
def run(request, small_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("answering")
    return make_run(small_data, root, "spans", *WORDS, f"model.encoder_layers={request.param}")


def fitting(model: Transformer, length: int) -> Transformer:
    """The model of rows whose source has this length."""
    if not model.config.has_encoder:
        return model
    copy = Transformer(replace(model.config, source_length=length)).eval()
    copy.load_state_dict(model.state_dict())
    return copy


@torch.no_grad()
def test_it_writes_what_is_most_likely_after_the_source_and_the_first_sentinel(run, forescale):
    view = open_run(run.path)
    size = view.identity["dataset"]["vocab_size"]
    ids = [view.tokenizer.encode(part).ids for part in ("def ", "(x):\n    return ")]
    source = [*ids[0], size, *ids[1], size + 1]
    model = fitting(view.model(), len(source))
    row, expected = [*source, size], "<extra_id_0>"
    for _ in range(LENGTH - 24):
        row.append(model(torch.tensor([row]))[0, -1].argmax().item())
        if row[-1] == size + 2:
            break
        token = row[-1] - size
        expected += f"<extra_id_{token}>" if token >= 0 else view.tokenizer.decode([row[-1]])
    code, out, _ = forescale("generate", run.path, f"prompt='{TEXT}'", "temperature=0")
    assert (code, out) == (0, expected + "\n")


def test_what_comes_of_a_seed_repeats(run, forescale):
    words = ("generate", run.path, f"prompt='{TEXT}'")
    once = forescale(*words, "seed=1")
    assert once[0] == 0
    assert once == forescale(*words, "seed=1")
    assert once[1] != forescale(*words, "seed=2")[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompt: has no <extra_id_0>"),
        ("a <extra_id_1> b", "has <extra_id_1> where the next one is <extra_id_0>"),
        ("<extra_id_0><extra_id_0>", "has <extra_id_0> where the next one is <extra_id_1>"),
        ("".join(f"<extra_id_{i}>" for i in range(5)), "has 5 spans to fill in, and in training a"),
        ("import sys\n" * 20 + "<extra_id_0>", "tokens, and in training a source has 24"),
    ],
)
def test_a_text_unlike_those_of_training_is_one_sentence(run, forescale, text, message):
    code, out, err = forescale("generate", run.path, f"prompt='{text}'")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


class Writes(torch.nn.Module):
    """Writes these ids, whatever it reads."""

    def __init__(self, *ids: int):
        super().__init__()
        self.ids, self.weight = list(ids), torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens_BL):
        logits = torch.zeros(*tokens_BL.shape, 400)
        logits[..., self.ids.pop(0)] = 1e9
        return logits


def test_an_answer_ends_with_the_sentinel_after_those_of_the_text(
    small_data, tmp_path, forescale, monkeypatch
):
    path = make_run(small_data, tmp_path, "spans", *WORDS).path
    view = open_run(path)
    (a,), size = view.tokenizer.encode("a").ids, view.identity["dataset"]["vocab_size"]
    writer = Writes(a, size + 1, a, size + 2, a)
    monkeypatch.setattr("forescale.inference.view.RunView.load", lambda *_: writer)
    code, out, err = forescale("generate", path, f"prompt='{TEXT}'")
    assert (code, out) == (0, "<extra_id_0>a<extra_id_1>a\n")
    assert "The answer ends after 3 tokens" in err
    writer.ids = [a] * 9
    code, out, err = forescale("generate", path, f"prompt='{TEXT}'")
    assert (code, out) == (0, "<extra_id_0>aaaaaaaa\n")
    assert "no end within 8 tokens, the most that it has in training" in err


def test_a_model_of_a_user_s_own_is_refused(run):
    view = open_run(run.path)
    view.config.model = TargetConfig("mine.Model")
    with pytest.raises(UserError, match=r"is your own class mine\.Model"):
        question_of(view, TEXT)


@pytest.fixture(scope="module", params=[0, 2], ids=["decoder", "encoder-decoder"])
def started(request, small_data, tmp_path_factory):
    words = [*SMALL, "objective=prefix", f"model.encoder_layers={request.param}"]
    return make_run(small_data, tmp_path_factory.mktemp("prefix"), "prefix", *words)


@torch.no_grad()
@pytest.mark.parametrize("text", ["def main(arg", "d", "", "import sys\n" * 9])
def test_it_continues_a_text_as_a_row_that_is_cut_before_its_last_token(started, forescale, text):
    """The encoder reads at most as much as in training, and the token before a document if there
    would be nothing else."""
    view = open_run(started.path)
    ids = view.tokenizer.encode(text).ids
    has_encoder = view.config.model.has_encoder
    row = ids if len(ids) > has_encoder else [*[0] * (1 + has_encoder - len(ids)), *ids]
    row = row[-LENGTH // 2 - 1 :] if has_encoder else row
    model, first = fitting(view.model(), len(row) - 1), len(row)
    for _ in range(LENGTH // 2):
        row.append(model(torch.tensor([row[-LENGTH:]]))[0, -1].argmax().item())
    continuation = view.tokenizer.decode(row[first:], skip_special_tokens=True)
    words = (f"prompt='{text}'", "temperature=0", f"num_tokens={LENGTH // 2}")
    assert forescale.prints("generate", started.path, *words) == text + continuation + "\n"


def test_an_answer_is_no_longer_than_in_training(started, forescale):
    code, _, err = forescale("generate", started.path, "prompt=def", "temperature=0")
    assert code == 0
    is_limited = "no end within 16 tokens" in err
    assert is_limited == open_run(started.path).config.model.has_encoder


SHAPE = ["train.sequence_length=12", "objective.source=6", "model.encoder_layers=1"]


@pytest.fixture(scope="module")
def reversing(tmp_path_factory):
    """A run of pairs, and its model after 160 steps in which it learns to write words reversed."""
    root = tmp_path_factory.mktemp("pairs")
    run = make_run(make_pairs(root / "words"), root / "runs", "pairs", *SMALL[:3], *KIND, *SHAPE)
    view, steps = open_run(run.path), 160
    torch.manual_seed(0)
    model = build_model(view.config, view.identity["dataset"]["vocab_size"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, 2 - 2 * i / steps))
    for batch in stream(feed(run.path), StepShare(32, 32), range(steps), 0, workers=0):
        positional, named = batch.micro[0].arguments(torch.device("cpu"))
        loss = model(*positional, **named).sum() / batch.targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        fall.step()
    return run, model


@pytest.mark.parametrize("word", ["abca", "ccab"])
def test_it_answers_a_source_with_its_target(reversing, forescale, monkeypatch, word):
    run, model = reversing
    monkeypatch.setattr("forescale.inference.view.RunView.load", lambda *_: model)
    code, out, err = forescale("generate", run.path, f"prompt={word}", "temperature=0")
    assert (code, out) == (0, word[::-1] + "\n")
    assert f"The answer ends after {len(word)} tokens" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty, and no source of training is"),
        ("a\tb", r"holds the separator '\t'"),
        ("abcabca", "has 7 tokens, and in training a source has 6"),
    ],
)
def test_what_is_no_source_is_one_sentence(reversing, forescale, text, message):
    code, out, err = forescale("generate", reversing[0].path, f"prompt='{text}'")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@torch.no_grad()
def test_a_decoder_alone_reads_source_and_separator(tmp_path, forescale):
    run = make_run(make_pairs(tmp_path / "w"), tmp_path / "runs", "p", *SMALL, *KIND, *SHAPE[:2])
    model, row = open_run(run.path).model(), [*b"abc\t"]
    for _ in range(6):
        row.append(model(torch.tensor([row]))[0, -1].argmax().item())
    text = byte_tokenizer().decode(row[4:], skip_special_tokens=True)
    code, out, err = forescale("generate", run.path, "prompt=abc", "temperature=0")
    assert (code, out) == (0, text + "\n")
    assert "no end within 6 tokens" in err


def test_a_source_of_an_objective_of_a_user_s_own_is_left_to_its_user(
    small_data, tmp_path, forescale, capsys
):
    """Nothing says how its model would read a prompt."""
    options = ["objective=own", "objective._target_=forescale.data.objectives.prefix.Prefix"]
    job = make_job(small_data, tmp_path, "own", *SMALL, *options, "model.encoder_layers=1")
    summary.summarize(start(job), generate)
    assert "generate" not in capsys.readouterr().out
    path = make_run(small_data, tmp_path, "made", *SMALL, *options, "model.encoder_layers=1").path
    code, _, err = forescale("generate", path, "prompt=def")
    assert (code, err.count("\n")) == (2, 1)
    assert "was trained with objective=own, and continues no text" in err
    assert forescale("eval", path, "trust=true")[0] == 0
    err = forescale.refuses("eval", path, "trust=true", "sequence_length=64")
    assert "rows of own have the length of the training" in err


def test_names_stand_between_whole_characters():
    tokenizer, ids = byte_tokenizer(), [*"é".encode(), 300, *"🙂".encode()[:2], 301, *b"x"]
    text = "".join(pieces(tokenizer, [], ids, {300: "<a>", 301: "<b>"}))
    assert text == f"é<a>{tokenizer.decode(list('🙂'.encode()[:2]))}<b>x"


def test_an_answer_in_a_chat_ends_with_the_token_that_ends_turns(trained):
    view = open_run(trained.path)
    view.tokenizer.add_special_tokens(["<|end|>"])
    source = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    template = ChatTemplate(source, "chat.jinja", ("<|end|>",), {})
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"))]
    question = chat_question(view, template, [*turns, turns[0]])
    last = view.tokenizer.token_to_id("<|end|>")
    assert [i for i, token in enumerate(question.start) if token == last] == [1, 3, 5]
    answer = Answer(view.tokenizer, question, GenerationConfig(9, Sampler()), seed=0)
    answer.add(question.start[0])
    assert answer.reason is None
    answer.add(last)
    assert (answer.reason, answer.text) == ("end", "a")
