"""`forescale generate`: text as it comes, whole characters only, without an engine."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forescale import open_run
from forescale.data.tokenizer import byte_tokenizer
from forescale.inference.generation import Answer, GenerationConfig, pieces, stream
from forescale.inference.question import Question, prompt_ids
from forescale.models.decoding.batch import generate
from forescale.models.decoding.sampler import Sampler

SAMPLER = Sampler(temperature=0.8, top_k=50)


def test_it_writes_what_the_sampler_draws_after_the_prompt(trained, forescale):
    view = open_run(trained.path)
    before = prompt_ids(view.tokenizer, "def ", 0)
    generator = torch.Generator().manual_seed(3)
    ids = generate(
        view.model(),
        torch.tensor([before]),
        20,
        sampler=SAMPLER,
        generator=generator,
        max_context=32,
    )[0].tolist()
    out = forescale.prints("generate", trained.path, "prompt=def ", "num_tokens=20", "seed=3")
    assert out == view.tokenizer.decode(ids) + "\n"


def piped(monkeypatch, raw: bytes) -> None:
    """Let standard input be a file with these bytes."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the test's end
    file.write(raw)
    file.seek(0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))


@pytest.mark.parametrize("raw", [b"d\xc3\xa9f x():", b"d\xc3\xa9f x():\n", b"d\xc3\xa9f x():\r\n"])
def test_a_prompt_comes_from_a_pipe(trained, forescale, monkeypatch, raw):
    words = ("generate", trained.path, "num_tokens=5")
    want = forescale(*words, "prompt='déf x():'")
    piped(monkeypatch, raw)
    assert forescale(*words, "prompt=-") == want
    assert want[1].startswith("déf x():")


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"\xff", "isn't UTF-8 (byte 0)"), (b"x" * 17_000_000, "more than 16,777,216 bytes")],
)
def test_a_pipe_that_holds_no_prompt_is_one_sentence(trained, forescale, monkeypatch, raw, message):
    piped(monkeypatch, raw)
    code, _, err = forescale("generate", trained.path, "prompt=-")
    assert (code, err.count("\n")) == (2, 1)
    assert f"prompt: standard input {message}" in err.replace("has ", "")


def test_an_empty_prompt_begins_a_document(trained, forescale):
    end = open_run(trained.path).identity["dataset"]["end_of_text"]
    assert prompt_ids(open_run(trained.path).tokenizer, "", end) == [end]
    assert forescale.prints("generate", trained.path, "num_tokens=5").strip()


def test_the_text_of_the_end_token_in_a_prompt_is_text(trained):
    tokenizer = open_run(trained.path).tokenizer
    assert 0 not in prompt_ids(tokenizer, "<|endoftext|>", 0)


class Once(torch.nn.Module):
    """Writes `first`, then the end of text, whatever it reads."""

    def __init__(self, *ids: int):
        super().__init__()
        self.ids, self.weight = list(ids), torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens_BL):
        logits = torch.zeros(*tokens_BL.shape, 300)
        logits[..., self.ids.pop(0)] = 1e9
        return logits


def test_it_ends_with_the_document(trained, forescale, monkeypatch):
    a = open_run(trained.path).tokenizer.encode("a").ids
    monkeypatch.setattr("forescale.inference.view.RunView.load", lambda *_: Once(*a, 0, *a))
    code, out, err = forescale("generate", trained.path, "prompt=>", "num_tokens=50")
    assert (code, out) == (0, ">a\n")
    assert "The document ends after 1 token.)" in err


PROMPTS = ["def ", "", "class Model:\n    width", "数据"]


@pytest.fixture
def listed(tmp_path):
    """The prompts in a file."""
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps(text) for text in PROMPTS]
    lines[1] = json.dumps({"prompt": PROMPTS[1]})
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("how", [["temperature=0"], ["top_p=0.9", "min_p=0.01"]], ids=" ".join)
def test_several_prompts_are_answered_as_each_alone(trained, forescale, listed, how):
    """Also beyond the 32 tokens of training, and where more are asked than are written at once."""
    words = ("generate", trained.path, "num_tokens=40", "repetition_penalty=1.1", *how)
    code, out, _ = forescale(*words, f"input={listed}", "batch=3", "--json", "seed=7")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["seed"] for row in rows] == [7, 8, 9, 10]
    for row in rows:
        alone = forescale(*words, f"prompt={row['prompt']}", f"seed={row['seed']}")
        assert alone[1] == row["prompt"] + row["text"] + "\n"
        assert (row["tokens"] == 40) == (row["reason"] == "length")


def test_prompts_of_a_list_and_of_lines_are_the_same(trained, forescale, tmp_path, monkeypatch):
    words = ("generate", trained.path, "num_tokens=5", "samples=2")
    want = forescale(*words, 'prompts=["def ", "class "]')
    assert re.findall("^--- .*", want[1], re.M) == [
        f"--- {i} of 4, seed {1336 + i}" for i in range(1, 5)
    ]
    (tmp_path / "lines.txt").write_text("def \nclass \r\n")
    assert forescale(*words, f"input={tmp_path / 'lines.txt'}") == want
    piped(monkeypatch, b"def \nclass ")
    assert forescale(*words, "input=-") == want


def test_a_stop_text_may_be_the_end_of_a_line(trained, forescale):
    words = ("prompt=x", "num_tokens=40", "seed=3", "--json")
    texts = []
    for stop in ("stop=[]", 'stop=["\\n"]'):
        _, out, _ = forescale("generate", trained.path, *words, stop)
        texts.append(json.loads(out)["text"])
    assert "\n" in texts[0]
    assert texts[1] == texts[0].partition("\n")[0]


def test_it_ends_before_a_stop_text_over_several_tokens(trained, forescale, monkeypatch):
    view = open_run(trained.path)
    ids = view.tokenizer.encode("naïve 数据!").ids
    assert len(view.tokenizer.encode("ïve 数").ids) > 2
    monkeypatch.setattr("forescale.inference.view.RunView.load", lambda *_: Once(*ids))
    code, out, err = forescale("generate", trained.path, "prompt=>", 'stop=["ïve 数", "据"]')
    assert (code, out) == (0, ">na\n")
    assert "A stop text ends it after" in err


def test_lines_that_are_typed_are_answered_one_by_one(trained, forescale, monkeypatch):
    """Here from a pipe. A line that can't be answered is one sentence, and the next is read."""
    words = ("generate", trained.path, "num_tokens=6", "temperature=0")
    want = "".join(forescale(*words, f"prompt={text}")[1] for text in ("def ", "naïve"))
    piped(monkeypatch, "def \nnaïve".encode())
    code, out, _ = forescale(*words, "--interactive")
    assert (code, out) == (0, want)


@pytest.mark.slow  # a process of its own
def test_at_a_terminal_it_prompts_streams_and_ends_with_ctrl_d(trained, tmp_path):
    code = "import sys; from forescale.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["generate", str(trained.path), "num_tokens=4", "temperature=0", "--interactive"]
    main_end, other_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=other_end, stdout=other_end, stderr=other_end
    )
    os.close(other_end)
    output = b""
    for typed in (b"def naive\n", b"\x04"):
        output += _until_prompt(main_end)
        os.write(main_end, typed)
    assert process.wait(60) == 0
    os.close(main_end)
    assert b"def naive" in output.split(b"> ", 1)[1]


def _until_prompt(terminal: int) -> bytes:
    parts = b""
    while not parts.endswith(b"> "):
        parts += os.read(terminal, 1)
    return parts


def test_a_long_text_sees_only_the_context_that_was_trained():
    lengths = []

    class Watched(Once):
        def forward(self, tokens_BL):
            lengths.append(tokens_BL.shape[1])
            return super().forward(tokens_BL)

    question = Question("", "", [1, 2, 3], [], -1, "document", max_context=8)
    answer = Answer(byte_tokenizer(), question, GenerationConfig(20, SAMPLER), seed=3)
    assert "".join(piece for _, piece in stream(Watched(*range(20)), [answer])) == answer.text
    assert max(lengths) == 8
    assert len(lengths) == 20


@given(st.lists(st.one_of(st.binary(max_size=5), st.text(max_size=3).map(str.encode))))
def test_pieces_add_up_and_hold_whole_characters(parts):
    """Also for bytes that are no UTF-8 at all, which a young model writes."""
    tokenizer, ids = byte_tokenizer(), list(b"".join(parts))
    parts = list(pieces(tokenizer, list(b"def"), ids))
    assert "".join(parts) == tokenizer.decode(ids)


def test_a_character_over_several_tokens_comes_at_once():
    parts = list(pieces(byte_tokenizer(), [], list("a🙂é".encode())))
    assert [p for p in parts if p] == ["a", "🙂", "é"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "nope: no run has this name or path"),
        (["small", "step=3"], "no such checkpoint; choose one of these steps: 4, 8"),
        (["small", "temperature=-1"], "temperature: must be at least 0"),
        (["small", "top_k=0"], "top_k: must be at least 1"),
        (["small", "promt=x"], "did you mean prompt"),
        ([], "target: is missing"),
        (["small", "prompt=x", "--interactive"], "interactive: excludes prompt; give one"),
        (["small", "top_p=0"], "top_p: must be more than 0"),
        (["small", "stop=[a,'']"], "stop: holds an empty text"),
        (["small", "input=none.txt"], "none.txt: there is no such file"),
        (["small", "input=wrong.jsonl"], "wrong.jsonl, line 2: is neither a text nor an object"),
    ],
)
def test_bad_input_is_one_sentence(own_run, forescale, words, message):
    Path("wrong.jsonl").write_text('"a"\n{"text": "b"}\n')
    err = forescale.refuses("generate", *words)
    assert message in err


@pytest.mark.slow  # a process of its own
def test_reading_a_checkpoint_never_imports_deepspeed(trained):
    code = (
        "import sys; from forescale.cli import main; "
        f"main(['generate', {str(trained.path)!r}, 'num_tokens=1']); "
        "sys.exit('deepspeed' in sys.modules or 'accelerate' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
