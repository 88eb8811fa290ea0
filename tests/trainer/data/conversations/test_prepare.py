"""From lines to a dataset: every line is an example or a named fault; every form of a preference
becomes the same two texts."""

import json
import os
import tracemalloc

import numpy as np
import pytest

from forescale.data.check import check
from forescale.data.conversations import prepare
from forescale.data.conversations.prepare import (
    Reader,
    faults_sentence,
    has_preferences,
    prepare_conversations,
)
from forescale.data.text.documents import ReadingReport
from forescale.data.tokenizer import byte_tokenizer
from forescale.ground.errors import UserError
from tests.preferences import make_preferences, message, preferences
from tests.questions import make_conversations, plain_template, request_of, rows, write_rows
from tests.trainer.data.small_dataset import flip

GOOD = {"prompt": "a", "response": "b"}
BAD = [
    "{bad",
    json.dumps({"prompt": "a", "response": " "}),
    json.dumps({"prompt": "a"}),
    json.dumps({"prompt": "a" * 80, "response": "b"}),
    json.dumps({"messages": [{"role": "user", "content": "only asked"}]}),
    json.dumps({"messages": [{"role": "robot", "content": "x"}]}),
    json.dumps({"messages": [{"role": "assistant", "content": "<|endoftext|>"}]}),
    json.dumps({"prompt": "\ud800", "response": "b"}),
    json.dumps({"prompt": 3, "response": "b"}),
]


def texts(dataset, split) -> list[tuple[bytes, bytes]]:
    """All text of each document and that of what is learned, an end of text written as $."""
    part, documents = dataset.split(split), []
    for shard, size in enumerate(part.shard_tokens):
        ends = part.document_ends(shard, 0, size)
        raw, learned = part.read(shard, 0, size), part.learned(shard)
        raw[raw == dataset.end_of_text] = ord("$")
        for ids, is_learned in zip(
            np.split(raw, ends)[:-1], np.split(learned, ends)[:-1], strict=True
        ):
            documents.append((bytes(ids.tolist()), bytes(ids[is_learned].tolist())))
    return documents


def expected(row) -> tuple[bytes, bytes]:
    if "prompt" in row:
        return f"{row['prompt']}{row['response']}$".encode(), f"{row['response']}$".encode()
    pieces = plain_template().pieces(row["messages"])
    parts = ("".join(p.text for p in pieces), "".join(p.text for p in pieces if p.learned))
    return tuple(part.replace("<|endoftext|>", "$").encode() for part in parts)


def test_every_example_is_there_once_with_its_responses(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_SHARD_TOKENS", 300)
    monkeypatch.setattr(prepare, "_MEMBER_TOKENS", 50)  # examples go on in the next member
    dataset = make_conversations(tmp_path)
    documents = [texts(dataset, split) for split in ("train", "validation")]
    assert sorted(documents[0] + documents[1]) == sorted(map(expected, rows()))
    assert len(documents[1]) == 12
    assert len(dataset.split("train").shard_tokens) > 1
    assert check(dataset.path) == []
    assert not set(documents[0]) & set(documents[1])


def test_equal_examples_are_in_one_split(tmp_path):
    dataset = make_conversations(tmp_path, rows(9) * 4, held_out=0.5)
    train, held_out = (texts(dataset, split) for split in ("train", "validation"))
    assert len(train) + len(held_out) == 36
    assert held_out
    assert not set(train) & set(held_out)


def test_an_empty_prompt_is_the_token_that_precedes_a_text(tmp_path):
    dataset = make_conversations(tmp_path, [{"prompt": "", "response": "b"}], held_out=0)
    assert texts(dataset, "train") == [(b"$b$", b"b$")]


def test_a_prompt_with_the_separator_of_pairs_is_a_fault(tmp_path):
    """It would be cut there. The ids around a source stand around every other prompt."""
    file, faults = tmp_path / "rows.jsonl", ReadingReport()
    file.write_text('{"prompt": "a\\tb", "response": "c"}\n{"prompt": "ab", "response": "c\\td"}\n')
    tokenizer, template = byte_tokenizer(), plain_template()
    around = ([1, 2], [3, ord("\t")])
    reader = Reader(tokenizer, template, 256, most=50, around=around)
    (example,) = reader.examples(str(file), faults)
    assert example.ids.tolist() == [1, 2, *b"ab", 3, *b"\t", *b"c\td", 256]
    assert example.learned.tolist() == [False] * 6 + [True] * 4
    assert faults.as_dict()["whose prompt holds the separator of pairs"]["count"] == 1


def test_what_is_no_example_is_named_by_line_and_stops(tmp_path):
    with pytest.raises(UserError) as e:
        make_conversations(tmp_path, [GOOD, "", *BAD])
    for line, reason in enumerate(["no valid JSON", "an empty response", "that are not"], 3):
        assert f"{reason}" in str(e.value)
        assert f"(line {line})" in str(e.value)
    assert "longer than the 65 tokens of a row (line 6, of 82 tokens)" in str(e.value)
    assert str(e.value).startswith(f"{tmp_path}/rows.jsonl: 9 lines can't be used: ")
    assert str(e.value).endswith("leave them out with unusable=skip.")
    assert not list(tmp_path.glob("conversations-*")), "nothing is built"


def test_a_line_without_end_is_a_fault_and_takes_no_memory(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [GOOD])
    os.truncate(path, 200 << 20)  # zeros
    tracemalloc.start()
    with pytest.raises(UserError, match=r"1 of more than 16 MiB \(line 2\)"):
        prepare_conversations(str(path), tmp_path, request_of())
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_lines_left_out_are_kept_in_the_report(tmp_path):
    dataset = make_conversations(tmp_path, [GOOD, *BAD], unusable="skip")
    assert dataset.manifest["splits"]["train"]["documents"] == 1
    assert "9 lines can't be used" in faults_sentence(dataset.manifest["report"]["left_out"])
    with pytest.raises(UserError, match="9 lines can't be used"):
        make_conversations(tmp_path, BAD, unusable="skip")


def test_the_same_file_and_request_are_built_once(tmp_path, monkeypatch):
    first = make_conversations(tmp_path)
    monkeypatch.setattr(prepare, "_build", lambda *arguments: pytest.fail("built again"))
    assert make_conversations(tmp_path).identity == first.identity


def test_what_is_learned_decides_the_identity(tmp_path):
    """The same tokens, of which others count."""
    rows = [{"prompt": "ab", "response": "c"}], [{"prompt": "a", "response": "bc"}]
    one, other = (make_conversations(tmp_path / str(i), r, held_out=0) for i, r in enumerate(rows))
    assert texts(one, "train")[0][0] == texts(other, "train")[0][0]
    assert one.identity != other.identity


def test_a_flipped_bit_of_the_column_is_found(tmp_path):
    dataset = make_conversations(tmp_path)
    path = dataset.path / "train-000000.tar"
    place = dataset.split("train").shard(0).members[0].learned["offset"]
    flip(path, place)
    with pytest.raises(UserError, match="member 000000 is damaged: its learned tokens"):
        dataset.split("train").learned(0)
    assert any("learned tokens" in fault for fault in check(dataset.path))


QUESTION, FOUR, FIVE = message("user", "2+2"), message("assistant", "4"), message("assistant", "5")
CHATS = {
    "texts after messages": {"messages": [QUESTION], "chosen": "4", "rejected": "5"},
    "messages after messages": {"messages": [QUESTION], "chosen": FOUR, "rejected": FIVE},
    "TRL, with a prompt": {"prompt": [QUESTION], "chosen": [FOUR], "rejected": [FIVE]},
    "TRL, without": {"chosen": [QUESTION, FOUR], "rejected": [QUESTION, FIVE]},
    "whole chats beside a prompt": {
        "prompt": "2+2",
        "chosen": [QUESTION, FOUR],
        "rejected": [QUESTION, FIVE],
        "score_chosen": 7.5,
    },
    "a prompt that is a text": {"prompt": "2+2", "chosen": [FOUR], "rejected": [FIVE]},
}


@pytest.mark.parametrize("form", CHATS)
def test_every_form_of_a_chat_is_the_same_preference(tmp_path, form):
    dataset = make_preferences(tmp_path, [CHATS[form]], held_out=0)
    side = "User:\n2+2\n\nAssistant:\n{}$"
    whole = "".join(side.format(answer) for answer in "45") + "$"  # which ends the document
    assert texts(dataset, "train") == [(whole.replace("$$", "$").encode(), b"4$5$")]


def test_texts_stand_as_they_are_each_after_its_prompt(tmp_path):
    row = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
    dataset = make_preferences(tmp_path, [row], held_out=0)
    assert texts(dataset, "train") == [(b"2+2=4$2+2=5$", b"4$5$")]
    assert dataset.manifest["build"]["source"]["kind"] == "preferences"


def test_of_a_chat_only_the_last_response_is_learned(tmp_path):
    dataset = make_preferences(tmp_path, preferences(1), held_out=0)
    ((_, learned),) = texts(dataset, "train")
    assert learned == b"0!$no$"


def test_preferences_of_one_prompt_are_in_one_split(tmp_path):
    lines = [{"prompt": f"{i % 6}?", "chosen": str(i), "rejected": f"not {i}"} for i in range(48)]
    dataset = make_preferences(tmp_path, lines, held_out=0.5)
    prompts = [{text[:2] for text, _ in texts(dataset, s)} for s in ("train", "validation")]
    assert [len(prompts_of_split) for prompts_of_split in prompts] == [3, 3]
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "responses are equal"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "an empty response"),
        (
            {"prompt": "a", "chosen": "b" * 80, "rejected": "c"},
            "longer than the 65 tokens of a row",
        ),
        ({"chosen": [FOUR], "rejected": [FIVE]}, "without a prompt"),
        ({"chosen": [QUESTION, FOUR], "rejected": [message("user", "3+3"), FIVE]}, "differ before"),
        ({"chosen": [QUESTION, QUESTION], "rejected": [QUESTION, FIVE]}, "is not the assistant's"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "that are not "),
        ({"prompt": "a", "chosen": [], "rejected": []}, "that are not "),
        (rows(2)[1], 'that are not {"prompt": ..., "chosen": ..., "rejected": ...}'),
    ],
)
def test_what_is_no_preference_is_named(tmp_path, row, reason):
    with pytest.raises(UserError) as e:
        make_preferences(tmp_path, [*preferences(2), row])
    assert reason in str(e.value)
    assert "(line 3" in str(e.value)


def test_among_examples_a_preference_is_a_fault_too(tmp_path):
    with pytest.raises(UserError, match=r'that are not {"prompt": ..., "response": ...}, '):
        make_conversations(tmp_path, [*rows(2), *preferences(1)])


def test_the_first_line_that_can_be_read_says_what_a_file_holds(tmp_path):
    assert has_preferences(write_rows(tmp_path / "a.jsonl", ["{bad", *preferences(2)]))
    assert not has_preferences(write_rows(tmp_path / "b.jsonl", [*rows(2), *preferences(2)]))
    assert not has_preferences(str(tmp_path / "none.jsonl"))
