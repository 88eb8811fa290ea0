"""A chat template runs apart and within limits; long conversations are divided in one pass as they
are by a rendering of each of their beginnings."""

import random
import resource
from itertools import product

import pytest

from forescale.data.conversations import rendering
from forescale.data.conversations.division import Division, Unfit
from forescale.data.conversations.prepare import prepare_conversations
from forescale.data.conversations.template import PLAIN, ChatTemplate
from forescale.ground.errors import UserError
from tests.questions import TOKENS, request_of, rows, write_rows
from tests.trainer.data.conversations.test_template import BARE, CHATML, IM

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}\
{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system %}\
{% set content = '<<' + system + '>>' + message['content'] %}{% else %}\
{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% else %}\
{{ ' ' + content | trim + ' ' + '<|im_end|>' }}{% endif %}{% endfor %}"""
ZEPHYR = """{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}\
{{ '<|im_end|>' }}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}\
{% endfor %}"""
# System messages come first; what follows a message depends on the ones before it.
DEEPSEEK = """{% set ns = namespace(system='', is_user=false) %}{% for m in messages %}\
{% if m['role'] == 'system' %}{% set ns.system = ns.system + m.content %}{% endif %}{% endfor %}\
{{ bos_token }}{{ ns.system }}{% for m in messages %}{% if m['role'] == 'user' %}\
{% set ns.is_user = true %}{{ '<|User|>' + m['content'] }}{% elif m['role'] == 'assistant' %}\
{% if ns.is_user %}{{ '<|Assistant|>' }}{% endif %}{% set ns.is_user = false %}\
{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt and ns.is_user %}{{ '<|Assistant|>' }}{% endif %}"""
# The name of the list is set anew, and a list of tools is read that isn't there.
LLAMA_3 = """{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}\
{% if tools is defined %}{{ tools | reject('equalto', 'code') | join(', ') }}{% endif %}\
{% for m in messages %}{% if 'tools' in m %}{% for k, v in m.tools | items %}{{ k }}{% endfor %}\
{% else %}{{ m.role + m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"""
COUNT = "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}"
END = "{% endfor %}"
COUNTED = COUNT + "{{ n.i }}{{ m.content }}<|im_end|>{% endfor %}"
# A text after the last message; thoughts left out of earlier turns.
TAILS = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{{ messages[-1].role }}"
THOUGHTS = """{% for m in messages %}{{ m.role }}{% if loop.last %}{{ m.content }}{% else %}\
{{ m.content.split('t')[-1] }}{% endif %}<|im_end|>{% endfor %}"""
LINEAR = [PLAIN, CHATML, BARE, LLAMA_2, ZEPHYR, TAILS, THOUGHTS, DEEPSEEK, LLAMA_3, COUNTED]
# What a single pass can't show: a template that remembers, or looks at the whole.
WHOLE = [
    COUNT + END + BARE + "{{ n.i }}",  # one loop begins with what another one counted
    COUNT + "{% endfor %}{% set i = n.i > 6 %}{% for m in messages %}{{ m.role if i }}{% endfor %}",
    COUNT.replace("{% set n.i = n.i + 1", "{{ n.i.index }}{{ m.content }}{% set n.i = loop") + END,
    "{% for m in messages %}{% endfor %}{{ messages|length > 9 }}" + BARE,
    "{% for m in messages %}{{ 'a' if loop.first or loop.last and loop.index < 10 }}{% endfor %}"
    + BARE,
    "{{ 'a' if messages | join(attribute='role') | length in [17, 26] }}" + BARE,
    COUNT + "{{ m.content }}{% set n = namespace(i=n.i) %}{{ n.i }}{% endfor %}",
    "{% for m in messages[1:] %}{{ m.content }}{{ messages | join(attribute='role') }}{% endfor %}",
    "{% set it = [1]|select %}{% for m in messages %}{{ it|join }}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{{ add_generation_prompt }}{% endfor %}",
    "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}",
    "{{ messages|map(attribute='content')|join }}", "{{ messages|length }}" + BARE, BARE + BARE,
    "{% for m in messages|list %}{{ m.content }}{{ loop.index }}{% endfor %}", "{{ messages }}",
    "{% for m in messages if m.content %}{{ loop.index }}{{ m.content }}{% endfor %}",
    "{% macro f(ms) %}{% for m in ms %}{{ m.content }}{% endfor %}{% endmacro %}{{ f(messages) }}",
    "{% set b %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ b }}",
    "{% set it = 'abcd'|map('upper') %}{% for m in messages %}{{ it|first }}{% endfor %}",
    "{% for m in messages %}{{ loop.nextitem.role }}{{ m.content }}{{ loop.length }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% else %}none{% endfor %}{{ messages is sequence }}",
    "{% for m in messages %}{{ messages[loop.index0 + 2].role }}{{ m.content }}{% endfor %}",
]  # fmt: skip


def chat(draw: random.Random, turns: int) -> list[dict[str, str]]:
    roles = ["system"] * (draw.random() < 0.3) + ["user", "assistant"] * turns
    roles = [r if draw.random() < 0.97 else draw.choice(("user", "assistant")) for r in roles]
    return [
        {"role": r, "content": "".join(draw.choices("ab t", k=draw.randrange(4)))} for r in roles
    ]


def divided(divide, *arguments):
    try:
        return divide(*arguments)
    except Unfit:
        return None


@pytest.mark.parametrize("source", [*LINEAR, *WHOLE])
def test_a_long_conversation_is_divided_as_by_a_rendering_of_each_beginning(source):
    division, draw, is_linear = Division(source, IM, TOKENS), random.Random(0), False
    passes = division._by_passes

    def noted(*arguments):
        nonlocal is_linear
        for response in passes(*arguments):
            is_linear = True
            yield response

    division._by_passes = noted
    for _, turns in product(range(12), (5, 6)):
        messages = chat(draw, turns)
        responses = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        beginnings = division._by_beginnings(messages, responses)
        assert divided(division.turns, messages) == divided(division._divided, beginnings)
    assert is_linear == (source in LINEAR)


@pytest.mark.parametrize("source", [PLAIN, CHATML, ZEPHYR, DEEPSEEK, LLAMA_3])
def test_work_grows_as_the_number_of_turns(source):
    def characters(turns: int) -> int:
        division, count = Division(source, IM, TOKENS), 0
        text = division._text

        def counted(*arguments):
            nonlocal count
            count += len(result := text(*arguments))
            return result

        division._text = counted
        division.prompt([{"role": r, "content": "ab"} for r in ("user", "assistant") * turns][:-1])
        return count

    assert characters(400) < 2.2 * characters(200)


LIMITS = {
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ raise_exception('no') }}": r"refuses \(no\)",
    "{{ raise_exception() }}": "TypeError",
    "{% for i in range(10**9) %}{% endfor %}": "OverflowError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ 'x' * 10**10 }}": "more than 1,024 MiB of memory",
    "{{ 'x' | center(10**8) }}": "over 16 times the text",
    "{{ '\\ud800' }}": "UnicodeEncodeError",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "can't be read",
}


@pytest.mark.parametrize(("source", "message"), LIMITS.items(), ids=LIMITS.values())
def test_whatever_a_template_does_is_one_sentence_that_names_it(source, message):
    with pytest.raises(UserError, match=rf"^chat\.jinja: this chat template .*{message}"):
        ChatTemplate(source, "chat.jinja", IM, TOKENS).check()


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ (9 + messages | length) ** (10**7) }}",  # one instruction
    ],
)
def test_a_template_without_an_end_is_ended_and_the_next_conversation_has_its_turn(
    source, monkeypatch
):
    monkeypatch.setattr(rendering, "_SECONDS", 0.5)
    source = "{% if messages[0].content == 'bad' %}" + source + "{% endif %}" + CHATML
    template = ChatTemplate(source, "chat.jinja", IM, TOKENS)
    messages = [{"role": r, "content": "good"} for r in ("user", "assistant")]
    pieces = template.pieces(messages)
    with pytest.raises(UserError, match=r"chat\.jinja: .*more than 0\.5 s of a processor"):
        template.pieces([{"role": "user", "content": "bad"}, messages[1]])
    assert template.pieces(messages) == pieces


def test_the_process_has_its_own_limits_and_ends_with_its_template():
    template = ChatTemplate(CHATML, "chat.jinja", IM, TOKENS)
    template.check()
    process = template._renderer._process
    assert resource.prlimit(process.pid, resource.RLIMIT_AS)[0] == 1 << 30
    del template
    assert process.poll() is not None


def test_lines_that_a_template_refuses_or_fails_at_are_named(tmp_path):
    source = "{% if messages[0].content == '6?' %}{{ 1 / 0 }}{% endif %}" + PLAIN
    request = request_of(template=ChatTemplate(source, "chat.jinja", IM, TOKENS))
    path = write_rows(tmp_path / "rows.jsonl", rows(30))
    with pytest.raises(UserError, match=r"1 line can't be used: 1 .*ZeroDivisionError.*\(line 7\)"):
        prepare_conversations(str(path), tmp_path, request)
    source = "{% if messages[0].content == '6?' %}{{ 'x' * 10**10 }}{% endif %}" + PLAIN
    template = ChatTemplate(source, "chat.jinja", IM, TOKENS)
    request = request_of(template=template, unusable="skip")
    with pytest.raises(UserError, match=r"chat\.jinja: .*more than 1,024 MiB"):
        prepare_conversations(str(path), tmp_path, request)
