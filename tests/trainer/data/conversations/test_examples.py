"""Lines with a chosen and a rejected response: every usual form becomes the same two texts."""

import pytest

from forescale.data.conversations.examples import has_preferences
from forescale.ground.errors import UserError
from tests.preferences import make_preferences, message, preferences
from tests.questions import make_conversations, rows, write_rows
from tests.trainer.data.conversations.test_prepare import texts

QUESTION, GOOD, BAD = message("user", "2+2"), message("assistant", "4"), message("assistant", "5")
CHATS = {
    "texts after messages": {"messages": [QUESTION], "chosen": "4", "rejected": "5"},
    "messages after messages": {"messages": [QUESTION], "chosen": GOOD, "rejected": BAD},
    "TRL, with a prompt": {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
    "TRL, without": {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    "whole chats beside a prompt": {
        "prompt": "2+2",
        "chosen": [QUESTION, GOOD],
        "rejected": [QUESTION, BAD],
        "score_chosen": 7.5,
    },
    "a prompt that is a text": {"prompt": "2+2", "chosen": [GOOD], "rejected": [BAD]},
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
        ({"chosen": [GOOD], "rejected": [BAD]}, "without a prompt"),
        ({"chosen": [QUESTION, GOOD], "rejected": [message("user", "3+3"), BAD]}, "differ before"),
        ({"chosen": [QUESTION, QUESTION], "rejected": [QUESTION, BAD]}, "is not the assistant's"),
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
    with pytest.raises(UserError, match=r'that are not {"prompt": ..., "response": ...} or'):
        make_conversations(tmp_path, [*rows(2), *preferences(1)])


def test_the_first_line_that_can_be_read_says_what_a_file_holds(tmp_path):
    assert has_preferences(write_rows(tmp_path / "a.jsonl", ["{bad", *preferences(2)]))
    assert not has_preferences(write_rows(tmp_path / "b.jsonl", [*rows(2), *preferences(2)]))
    assert not has_preferences(str(tmp_path / "none.jsonl"))
