"""A chat template runs apart and within limits, which grow with the messages of training."""

import resource

import pytest

from forescale.data.conversations import rendering
from forescale.data.conversations.prepare import prepare_conversations
from forescale.data.conversations.template import PLAIN, ChatTemplate
from forescale.ground.errors import UserError
from tests.questions import TOKENS, request_of, rows, write_rows
from tests.trainer.data.conversations.test_template import CHATML, IM

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


def test_a_long_conversation_of_training_has_more_time():
    limits = [rendering.seconds_for(n, is_prompt=False) for n in (2, 1000, 4000)]
    assert limits == [10, 10, 40]
    assert rendering.seconds_for(4000, is_prompt=True) == 3


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
