"""Chat templates: the text is that of transformers, and only responses are learned."""

import pytest

from forescale.data.conversations.template import PLAIN, ChatTemplate, Piece, Unfit
from forescale.errors import UserError
from tests.questions import SPECIAL, TOKENS, plain_template

CHATML = (
    "{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content"
    " + '<|im_end|>\\n' }}{%- endif %}\n"
    "{% for message in messages if message.role != 'system' %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}\n"
)
TURNS = [("system", "Be short."), ("user", "a?"), ("assistant", "b"), ("user", "c <x>")]
TURNS += [("assistant", "d\ne "), ("user", "unanswered")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
IM = ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(("source", "special"), [(CHATML, IM), (PLAIN, SPECIAL)])
def test_the_text_is_that_of_transformers(source, special):
    from transformers.utils.chat_template_utils import render_jinja_template

    template = ChatTemplate(source, "chat.jinja", special, TOKENS)
    text = "".join(piece.text for piece in template.pieces(MESSAGES))
    (theirs,), _ = render_jinja_template([MESSAGES[:5]], chat_template=source, **TOKENS)
    assert theirs.startswith(text)
    assert theirs[len(text) :].strip() == "", "only what follows the last response is left out"
    (asked,), _ = render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=True, **TOKENS
    )
    assert template.prompt(MESSAGES) == asked


def test_each_response_is_learned_up_to_the_token_that_ends_it():
    found = ChatTemplate(CHATML, "chat.jinja", IM, TOKENS).pieces(MESSAGES)
    assert [piece.text for piece in found if piece.learned] == ["b<|im_end|>", "d\ne <|im_end|>"]
    assert found[2].text.startswith("\n<|im_start|>user"), "the line end belongs to what follows"
    assert plain_template().pieces(MESSAGES[1:3]) == [
        Piece("User:\na?\n\nAssistant:\n", False),
        Piece("b<|endoftext|>", True),
    ]


def test_a_template_that_rewrites_earlier_turns_or_refuses_them_is_named():
    rewrites = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"chat\.jinja: .*in two ways"):
        ChatTemplate(rewrites, "chat.jinja", IM, TOKENS).check()
    refuses = "{% if messages|length > 3 %}{{ raise_exception('too many') }}{% endif %}"
    refuses += "{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(refuses, "chat.jinja", IM, TOKENS)
    template.check()
    with pytest.raises(Unfit, match="too many"):
        template.pieces(MESSAGES)


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ messages.__class__.__mro__ }}", "{{ nobody.content }}"]
)
def test_a_template_that_is_broken_or_reaches_out_is_a_sentence(source):
    with pytest.raises(UserError, match=r"chat\.jinja: this chat template"):
        ChatTemplate(source, "chat.jinja", IM, TOKENS).check()
