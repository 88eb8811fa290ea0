"""Evaluation texts are kept out: by their 13-grams, whatever case, punctuation and format."""

import json
import pickle

import pytest

from forescale.data.curate.step import Draft
from forescale.data.curate.steps import decontaminate as module
from forescale.data.curate.steps.decontaminate import Decontaminate
from forescale.ground.errors import UserError

QUESTION = "If a train leaves at noon, and another one at two, which of both is first in Rome?"
SHARED = "A TRAIN leaves at noon and another one at “two” which of\nboth is FIRST"
CLEAN = " ".join(f"word{i}" for i in range(300))


@pytest.fixture
def files(tmp_path) -> list[str]:
    lines = [{"text": QUESTION}, {"text": "Name the four largest moons of the planet Jupiter."}]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "story.txt").write_text(" ".join(f"story{i}" for i in range(50)))
    return [str(tmp_path / "exam.jsonl"), str(tmp_path / "story.txt")]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (f"{CLEAN} {SHARED} {CLEAN}", "exam.jsonl"),
        (f"{SHARED}\n{' '.join(f'Story{i}' for i in range(20, 40))}", "exam.jsonl, story.txt"),
        ("(name the four largest moons of the planet jupiter)", "exam.jsonl"),
        ("a train leaves at noon and another one at two which of", None),  # 12 of its words
        ("the four largest moons of the planet Jupiter", None),
        (CLEAN, None),
        ("", None),
    ],
)
def test_a_document_that_shares_an_ngram_is_dropped(files, text, names):
    draft = Draft("d", text)
    reason = Decontaminate(files)(draft)
    assert reason == (None if names is None else "shares text with an evaluation")
    assert draft.attributes == ({} if names is None else {"contaminated": names})
    assert draft.text == text


def test_the_passage_is_cut_with_what_is_around_it(files):
    step = Decontaminate(files, action="cut")
    draft = Draft("d", f"{CLEAN} Ü. {SHARED} É, {CLEAN}")
    assert step(draft) is None
    assert draft.text == f"{CLEAN[:-196]}\n\n{CLEAN[196:]}"
    assert draft.attributes == {"contaminated": "exam.jsonl"}
    assert (
        step(Draft("d", f"{CLEAN[:300]} {SHARED}")) == "nothing left without text of an evaluation"
    )
    many = f"{CLEAN} {SHARED} " * 11
    assert step(Draft("d", many)) == "shares text with an evaluation in many places"


def test_letters_whose_lower_case_is_longer_keep_the_places(files):
    draft = Draft("d", f"{'İK' * 200} {SHARED} {CLEAN}")
    assert Decontaminate(files, action="cut")(draft) is None
    assert draft.text == f"{('İK' * 200)[:-199]}\n\n{CLEAN[199:]}"


def test_other_processes_get_the_settings_alone(files):
    step = Decontaminate(files)
    before = pickle.dumps(step)
    assert step(Draft("d", SHARED))
    assert pickle.dumps(step) == before
    assert pickle.loads(before)(Draft("d", SHARED))


def test_what_the_files_hold_identifies_the_step(files, tmp_path):
    step = Decontaminate(files)
    moved = tmp_path / "moved.jsonl"
    moved.write_text((tmp_path / "exam.jsonl").read_text())
    assert Decontaminate([str(moved), files[1]]).fingerprint() == step.fingerprint()
    assert Decontaminate(files[:1]).fingerprint() != step.fingerprint()


def test_the_held_out_text_of_a_dataset(dataset, texts, tmp_path):
    step = Decontaminate([str(dataset)])
    held_out = [t for t in texts if len(t.split()) > 13 and step(Draft("d", t.decode()))]
    assert 0 < len(held_out) < len(texts)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"files": []}, "decontaminate.files: is empty"),
        ({"files": ["a"], "action": "mark"}, "choose drop or cut"),
        ({"files": ["a"], "words": 7}, "set it to 8 to 1000"),
    ],
)
def test_settings_that_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Decontaminate(**options).check()


def test_files_that_are_refused(files, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file or folder"):
        Decontaminate([str(tmp_path / "none.jsonl")])(Draft("d", CLEAN))
    (tmp_path / "short.txt").write_text("too few words")
    with pytest.raises(UserError, match=r"short.txt: holds no text of 8 words or more"):
        Decontaminate([str(tmp_path / "short.txt")])(Draft("d", CLEAN))
    monkeypatch.setattr(module, "_MOST", 30)
    with pytest.raises(UserError, match=r"story.txt: brings .* to more than 30 different n-grams"):
        Decontaminate(files)(Draft("d", CLEAN))
