"""The forms of a row, and the files in which it stands: each becomes the same example."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forescale.data.conversations.division import Unfit
from forescale.data.conversations.examples import canonical, checked_messages
from forescale.data.conversations.prepare import prepare_conversations
from forescale.data.conversations.template import ChatTemplate
from forescale.ground.errors import UserError
from tests.questions import SPECIAL, TOKENS, request_of

SYSTEM = {"role": "system", "content": "s"}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
FORMS = [
    ({"prompt": "a", "completion": "b"}, {"prompt": "a", "response": "b"}),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {"messages": CHAT}),
    ({"messages": CHAT, "prompt": "a", "id": 3}, {"messages": CHAT}),
    ({"conversations": SHARED}, {"messages": CHAT}),
    ({"conversations": CHAT, "system": ""}, {"messages": CHAT}),
    ({"conversations": SHARED, "system": "s"}, {"messages": [SYSTEM, *CHAT]}),
    ({"instruction": "a", "input": "", "output": "b"}, {"messages": CHAT}),
    ({"instruction": "a", "output": "b", "system": "s"}, {"messages": [SYSTEM, *CHAT]}),
    (
        {"instruction": "do", "input": "it", "output": "b"},
        {"messages": [{"role": "user", "content": "do\n\nit"}, CHAT[1]]},
    ),
    (
        {
            "conversations": SHARED[:1],
            "chosen": SHARED[1],
            "rejected": {"from": "gpt", "value": "c"},
        },
        {
            **{"conversations": CHAT[:1], "prompt": CHAT[:1], "chosen": CHAT[1]},
            "rejected": {"role": "assistant", "content": "c"},
        },
    ),
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
WITH_TOOLS = (
    "{% for t in tools %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def calls(arguments) -> dict:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    request = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "name": "add", "content": "3"}
    return {"messages": [CHAT[0], request, answer, CHAT[1]], "tools": [TOOL]}


@pytest.mark.parametrize(("row", "expected"), FORMS, ids=str)
def test_each_form_is_recognised_by_its_keys(row, expected):
    assert canonical(row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "answer": "b"}, 'that are not {"prompt": ..., "response": ...}, {"prom'),
        ({"prompt": "a", "response": "b", "messages": CHAT}, "that are not"),
        ([1], "that are not"),
        ({"prompt": CHAT, "completion": CHAT[1:]}, "with a response in the prompt"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, 'with a "history"'),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "with a role that is none of"),
        (calls("{"), 'whose "tool_calls" is no list of'),
        ({**calls({}), "tools": [1]}, 'whose "tools" is no list of objects'),
    ],
    ids=str,
)
def test_what_is_no_form_says_why(row, reason):
    with pytest.raises(Unfit) as e:
        checked_messages(canonical(row), WITH_TOOLS)
    assert reason in str(e.value)


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
def test_calls_of_tools_are_read_and_learned(arguments):
    template = ChatTemplate(WITH_TOOLS, "tools", SPECIAL, TOKENS)
    pieces = template.pieces(checked_messages(canonical(calls(arguments)), WITH_TOOLS))
    end = SPECIAL[0]
    assert [piece.text for piece in pieces] == [
        *("[add]<user>a<assistant>", 'add{"x": 1}' + end, "<tool>3<assistant>", f"b{end}")
    ]
    assert [piece.learned for piece in pieces] == [False, True, False, True]
    shared = [*SHARED[:1], {"from": "function_call", "value": json.dumps({"name": "add"})}]
    shared += [{"from": "observation", "value": "3"}, SHARED[1]]
    row = canonical({"conversations": shared, "tools": json.dumps([TOOL])})
    assert "[add]<user>a<assistant>add{}" in "".join(
        piece.text for piece in template.pieces(checked_messages(row, WITH_TOOLS))
    ).replace(end, "")


def test_a_template_that_would_leave_out_the_calls_is_refused():
    with pytest.raises(Unfit, match="with tools, which the chat template doesn't write"):
        checked_messages(canonical(calls({})), "{{ messages }}")


def file_of(folder, kind: str, rows: list) -> str:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        return f"hf://{folder / 'saved'}"
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "hub"])
def test_a_file_of_each_kind_holds_the_same_examples(kind, tmp_path):
    template = ChatTemplate(WITH_TOOLS, "tools", SPECIAL, TOKENS)
    request = request_of(template=template, most=200)
    rows = [calls({"x": 1}), {"messages": CHAT}, {"messages": [SYSTEM, *CHAT]}]
    dataset = prepare_conversations(file_of(tmp_path, kind, rows), tmp_path / "cache", request)
    other = prepare_conversations(file_of(tmp_path, "jsonl", rows), tmp_path / "other", request)
    assert dataset.corpus_hash == other.corpus_hash
    (tmp_path / "bad").mkdir()
    bad = file_of(tmp_path / "bad", kind, [*rows, {"messages": None}])
    unit = "line" if kind == "jsonl" else "row"
    with pytest.raises(
        UserError, match=rf"1 {unit} can't be used: 1 that are .* \({unit} 4\)"
    ) as e:
        prepare_conversations(bad, tmp_path / "none", request)
    assert str(e.value).startswith(bad)
