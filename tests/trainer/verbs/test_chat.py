"""`generate --chat`: messages that are answered by the template that a run was fine-tuned with."""

import io
import json
import sys
import tempfile

import pytest

from forescale import open_run
from forescale.ground.storage import read_json
from forescale.inference.generation import Answer, GenerationConfig, complete
from forescale.inference.question import chat_question
from forescale.inference.view import RunView
from forescale.models.decoding.sampler import Sampler
from forescale.run import finetune
from tests.questions import KIND, make_conversations, plain_template, rows, write_rows
from tests.trainer.small_run import make_run

WORDS = ("num_tokens=6", "temperature=0")
OTHER = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
OTHER += "{% if add_generation_prompt %}<assistant>{% endif %}"
MODEL = ("model.num_layers=1", "model.width=32", "model.num_heads=2")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    return make_run(
        make_conversations(folder / "data").path, folder / "runs", "chat", *KIND, *MODEL
    )


def messages(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


def typed(monkeypatch, raw: bytes, is_person=False) -> None:
    """Let standard input be these lines, of a pipe or as if typed in a terminal."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the test's end
    file.write(raw)
    file.seek(0)
    stream = io.TextIOWrapper(file)
    monkeypatch.setattr(sys, "stdin", stream)
    if is_person:
        monkeypatch.setattr(stream, "isatty", lambda: True)


def test_a_message_is_answered_after_the_prompt_of_the_template(chat, forescale):
    prompt = plain_template().prompt(messages("1?"))
    whole = forescale.prints("generate", chat.path, f"prompt='{prompt}'", *WORDS)
    answer = forescale.prints("generate", chat.path, "prompt=1?", "--chat", *WORDS)
    assert answer == whole.removeprefix(prompt)


def test_a_person_has_commands_and_a_pipe_none(chat, forescale, monkeypatch):
    words = ("generate", chat.path, *WORDS, "--chat", "--interactive", "--json")
    lines = b"1?\n/clear\n1?\n/help\n/quit\n1?\n"
    typed(monkeypatch, lines, is_person=True)
    _, out, err = forescale(*words)
    first, second = (json.loads(line[line.index("{") :]) for line in out.splitlines())
    assert first["text"] == second["text"]
    assert "/help shows the commands" in err
    assert "/quit    end" in err
    typed(monkeypatch, lines)
    assert len(forescale(*words)[1].splitlines()) == 6


def test_lines_are_a_conversation_until_an_empty_one(chat, forescale, monkeypatch):
    typed(monkeypatch, b"1?\nsure?\n\n1?\n")
    words = ("generate", chat.path, *WORDS, "--json")
    lines = forescale(*words, "--chat", "--interactive")[1].splitlines()
    first, second, third = (json.loads(line) for line in lines)
    assert first["text"] == third["text"]
    view = open_run(chat.path)
    question = chat_question(view, plain_template(), messages("1?", first["text"], "sure?"))
    answer = Answer(view.tokenizer, question, GenerationConfig(6, Sampler(0.0, None)), 1)
    assert second["text"] == next(iter(complete(view.model(), [answer], 1))).text
    assert second["prompt"] == "sure?"


def test_the_template_that_finetune_is_given_stays_with_the_run(chat, forescale, tmp_path):
    template, file = tmp_path / "other.jinja", write_rows(tmp_path / "sums.jsonl", rows())
    template.write_text(OTHER)
    options = (
        f"data={file}",
        f"run.root={tmp_path}",
        f"data.cache={tmp_path}",
        "prepare_only=true",
    )
    words = ("finetune", chat.path, *options, "run.name=other")
    assert forescale(*words)[0] == 0
    target = tmp_path / "other" / "chat.json"
    assert read_json(target)["chat_template"] == plain_template().source
    assert forescale(*words, f"template={template}")[0] == 0  # corrected before a step
    assert read_json(target)["chat_template"] == OTHER
    again = tmp_path / "other"
    assert forescale("finetune", again, *options, "run.name=again")[0] == 2  # has no checkpoint


def test_export_writes_it_for_transformers(chat, forescale, tmp_path):
    assert forescale("export", chat.path, f"to={tmp_path / 'there'}")[0] == 0
    transformers = pytest.importorskip("transformers")
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    text = hf_tokenizer.apply_chat_template(
        messages("1?"), tokenize=False, add_generation_prompt=True
    )
    assert text == plain_template().prompt(messages("1?"))


def test_a_template_without_a_chat_is_a_sentence(chat, forescale):
    err = forescale.refuses("generate", chat.path, "template=none.jinja")
    assert "template: writes conversations, and chat is false; add --chat" in err
    err = forescale.refuses("generate", chat.path, "template=none.jinja", "--chat")
    assert "none.jinja: no such file" in err


@pytest.mark.parametrize("text", [None, "{% for m in %}", "{{ raise_exception(1) }}"])
def test_a_template_that_cant_be_used_ends_a_conversation_before_it_begins(
    chat, forescale, monkeypatch, tmp_path, text
):
    file = tmp_path / "own.jinja"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(RunView, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    words = ("generate", chat.path, f"template={file}", "--chat", "--interactive")
    code, out, err = forescale(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "own.jinja: " in err


def test_a_conversation_reads_its_template_once(chat, forescale, monkeypatch, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(OTHER)
    words = ("generate", chat.path, f"template={file}", "--chat", "--interactive", *WORDS)
    read, texts = finetune.read_text, []

    def counted(path, *how, **options):
        texts.append(path)
        return read(path, *how, **options)

    monkeypatch.setattr(finetune, "read_text", counted)
    typed(monkeypatch, b"1?\nsure?\n")
    assert forescale(*words)[0] == 0
    assert texts.count(file) == 1
