"""A conversation divided into pieces by a chat template, read and learned in turn.

Invariant: the pieces are those of a rendering of each beginning of the conversation, which takes
quadratic time; of a template that leaves nothing from one message to the next, two passes show the
same (`_Pass`). Jinja's sandbox gives a template no files and no objects.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from types import GeneratorType
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

_GROWTH, _SPARE = 16, 1 << 10  # times the bytes of messages, and of each so many more
_REASON = 300  # characters of a template's own message
_SHORT = 4  # responses of a conversation that is rendered anew for each

# Of a template of these alone, no turn of a loop leaves anything to the next one but output.
_NODES = {
    *("Template", "Output", "TemplateData", "Name", "Const", "If", "For", "Assign", "Getattr"),
    *("Getitem", "Slice", "Call", "Keyword", "Filter", "Test", "Compare", "Operand", "And", "Or"),
    *("Not", "Add", "Sub", "Mul", "Mod", "Neg", "Concat", "CondExpr", "List", "Break", "Continue"),
}
_FILTERS = {
    *("trim", "upper", "lower", "capitalize", "title", "string", "tojson", "length", "count"),
    *("default", "d", "replace", "int"),
}
_STATEFUL = {"namespace", "cycler", "joiner", "lipsum", "dict", "self", "caller"}

Message = Mapping[str, str]  # role and content


class Unfit(Exception):
    """A conversation that can't be used; the text says why, as a reason to count."""


class Broken(Exception):
    """A template that can't be read, or goes beyond the limits of its process; the text says why.
    Conversations are not left out for it: which ones would depend on the machine."""


class Piece(NamedTuple):
    """A part of a conversation. learned: whether it is a response."""

    text: str
    learned: bool


class Refusal(TemplateError):
    """The template's own raise_exception."""


def _unfit(error: Exception) -> Unfit:
    if isinstance(error, TemplateError):
        return Unfit(f"that the chat template refuses ({_message_of(error)})")
    kind = type(error).__name__  # a mistake of a template may be any, such as 1 / 0
    return Unfit(f"with which the chat template fails ({kind}: {_message_of(error)})")


def _message_of(error: Exception) -> str:
    """Return an error's message, short and without control characters: it may be the template's."""
    return "".join(c if c.isprintable() else " " for c in str(error)[:_REASON])


class Division:
    """Divides conversations by a template; see Renderer, and ChatTemplate for the arguments."""

    def __init__(self, source: str, special: Sequence[str], tokens: Mapping[str, str]):
        self.source, self.special, self.tokens = source, special, tokens
        self._most = 0  # bytes of a text

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the turns so far and the rest of the prompt; one part where the template writes a
        turn in another way once others follow."""
        self._begin(messages)
        whole = self._rendered(messages, True)
        try:
            turns = self.turns(messages)
        except Unfit:
            return [Piece(whole, False)]
        done = "".join(piece.text for piece in turns)
        if not whole.startswith(done):
            return [Piece(whole, False)]
        return [*turns, Piece(whole[len(done) :], False)]

    def turns(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the parts up to the last response, read and learned in turn."""
        self._begin(messages)
        responses = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if len(responses) > _SHORT and responses[0] > 0 and self._single_pass is not None:
            with suppress(_Unclear):
                return self._divided(self._by_passes(messages, responses))
        return self._divided(self._by_beginnings(messages, responses))

    def _divided(self, responses: Iterator[tuple[int, str, str]]) -> list[Piece]:
        """Return the parts of prompts and the texts that end with their responses. Of each, and of
        what is done, so many characters are left out, which are equal."""
        turns = list[Piece]()
        done, start = "", 0
        for cut, before, after in responses:
            done, start = done[cut - start :], cut
            if not (before.startswith(done) and after.startswith(before)):
                raise Unfit("of which the chat template writes a turn in two ways")
            response = after[len(before) :]
            ends = [response.rfind(s) + len(s) for s in self.special if s in response]
            response = response[: max(ends)] if ends else response
            turns += [Piece(before[len(done) :], False), Piece(response, True)]
            done = before + response
        return turns

    def _by_beginnings(
        self, messages: Sequence[Message], responses: Sequence[int]
    ) -> Iterator[tuple[int, str, str]]:
        for i in responses:
            before = self._rendered(messages[:i], True)
            yield 0, before, self._rendered(messages[: i + 1], False)

    def _by_passes(
        self, messages: Sequence[Message], responses: Sequence[int]
    ) -> Iterator[tuple[int, str, str]]:
        """Yield the same in linear time. Raises _Unclear where the template may look elsewhere."""
        last = responses[-1]
        one, whole = _Pass(messages, 0, last), _Pass(messages, 0, last + 1)
        head, text = self._text_of_pass(one, True), self._text_of_pass(whole, False)
        starts = whole.starts
        alike = text.startswith(head[: one.starts.get(last - 1)])
        if not alike or starts != {**one.starts, last: starts.get(last)}:
            raise _Unclear
        if not {i for r in responses for i in (r - 1, r)} <= starts.keys():
            raise _Unclear

        def end(count: int, is_prompt: bool) -> str:
            """Return what the first messages end with, from the last of them on."""
            one = _Pass(messages, count - 1, count)
            return self._text_of_pass(one, is_prompt)[one.starts[count - 1] :]

        cut = 0
        for i in responses:
            before = head[cut : starts[i - 1]] + end(i, True)
            yield cut, before, text[cut : starts[i]] + end(i + 1, False)
            cut = starts[i - 1]

    def _text_of_pass(self, one: "_Pass", is_prompt: bool) -> str:
        """Return what the template writes in a pass."""
        assert self._single_pass is not None
        try:
            return self._text(self._single_pass, _Turns(one), is_prompt, one)
        except Refusal as e:  # of these messages: any other error may be one of the pass alone
            raise _unfit(e) from e
        except Exception as e:
            raise (e if isinstance(e, Unfit | MemoryError) else _Unclear()) from e

    def _rendered(self, messages: Sequence[Message], is_prompt: bool) -> str:
        template = self._template
        try:
            return self._text(template, messages, is_prompt)
        except (Unfit, MemoryError):
            raise
        except Exception as e:
            raise _unfit(e) from e

    def _begin(self, messages: Sequence[Message]) -> None:
        """Set the limit of texts. Raises Unfit where a message spells a special token: it would
        become that token, and a user could end a turn, or write one of the assistant's."""
        self._most = _GROWTH * sum(len(m["content"]) + _SPARE for m in messages)
        if any(token in message["content"] for token in self.special for message in messages):
            raise Unfit("with a special token in a message")

    def _text(
        self, template: Template, messages: Any, is_prompt: bool, one: "_Pass | None" = None
    ) -> str:
        names = {**self.tokens, "messages": messages, "add_generation_prompt": is_prompt}
        texts, size = list[str](), 0
        for text in template.root_render_func(template.new_context(names)):
            texts.append(text)
            size += len(text.encode())  # fails for half a character, which no tokenizer reads
            if one is not None:
                one.size += len(text)
            if size > self._most:
                raise Unfit(f"of which the chat template writes over {_GROWTH} times the text")
        return "".join(texts)

    @cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )

        def as_json(value: Any, indent: int | None = None, **_: Any) -> str:
            # Unlike Jinja's own filter, which escapes for HTML.
            return json.dumps(value, ensure_ascii=False, indent=indent)

        def refuse(message: str) -> None:
            raise Refusal(message)

        environment.filters["tojson"] = as_json
        environment.globals["raise_exception"] = refuse
        return environment

    @cached_property
    def _template(self) -> Template:
        try:
            return self._environment.from_string(self.source)
        except MemoryError:
            raise
        except Exception as e:  # also of Python's compiler, as for 200 nested brackets
            raise Broken(f"can't be read ({_message_of(e)})") from e

    @cached_property
    def _single_pass(self) -> Template | None:
        """The template for passes; None: it may be one that they don't show."""
        assert self._template is not None
        for node in self._environment.parse(self.source).find_all(nodes.Node):
            is_stateless = type(node).__name__ in _NODES and not getattr(node, "dyn_args", None)
            if isinstance(node, nodes.Filter):
                is_stateless &= node.name in _FILTERS
            elif isinstance(node, nodes.Name):
                is_stateless &= node.name not in _STATEFUL
            elif isinstance(node, nodes.For):
                is_stateless &= not (node.recursive or node.else_)
            if not is_stateless:
                return None
        template = self._environment.from_string(self.source)
        template.root_render_func.__globals__["LoopContext"] = _loop
        return template


class _Unclear(BaseException):
    """A pass doesn't show what a template does. No test of Jinja's catches it, as `is sequence`
    does exceptions."""


class _Pass:
    """One loop over the messages from `begin` to `end`, where the conversation seems to end.

    Take a template that leaves no state between turns of a loop (see _NODES) and, at each message,
    looks no further than the next one. Of the first k messages it writes what it writes of all of
    them before the last of the k, and then what a pass over that one message writes. So a pass from
    0 and a pass over each message show the renderings of all beginnings. starts: the size of the
    text before each message.
    """

    def __init__(self, messages: Sequence[Message], begin: int, end: int):
        self.messages, self.begin, self.end = messages, begin, end
        self.at, self.is_over, self.size = -1, False, 0
        self.starts: dict[int, int] = {}


def _unclear(*_: Any) -> Any:
    raise _Unclear


class _Turns:
    """The messages of a pass from one on, as a template sees them. All else is _Unclear."""

    def __init__(self, one: _Pass, first: int = 0):
        self._pass, self._first = one, first

    def __iter__(self) -> Iterator[Message]:
        one = self._pass
        if one.starts:
            raise _Unclear
        for i in range(max(one.begin, self._first), one.end):
            one.at, one.starts[i] = i, one.size
            yield one.messages[i]
        one.is_over = True

    def __getitem__(self, key: Any) -> Any:
        one = self._pass
        if isinstance(key, slice) and key == slice(key.start, None) and (key.start or 0) >= 0:
            return _Turns(one, self._first + (key.start or 0))
        if isinstance(key, int) and 0 <= key <= min(one.at + 1, one.end - 1) - self._first:
            return one.messages[self._first + key]
        if key == one.at + 1 - self._first == one.end - self._first:
            raise IndexError
        return self._all()[key]

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> Sequence[Message]:
        if not self._pass.is_over:
            raise _Unclear
        return self._pass.messages[self._first : self._pass.end]

    __contains__ = __eq__ = __getattr__ = __repr__ = _unclear
    __hash__ = None  # type: ignore[assignment]  # as lists


class _Loop:
    """The variable `loop` in a pass."""

    def __init__(self, turns: _Turns):
        self._turns, self._pass = turns, turns._pass

    def __iter__(self) -> Iterator[tuple[Message, "_Loop"]]:
        return ((message, self) for message in self._turns)

    __getattr__ = __repr__ = _unclear
    index0 = property(lambda self: self._pass.at - self._turns._first)
    index = property(lambda self: self.index0 + 1)
    first = property(lambda self: self.index0 == 0)
    last = property(lambda self: self._pass.at == self._pass.end - 1)


def _loop(iterable: Any, *arguments: Any) -> Any:
    if isinstance(iterable, GeneratorType):  # the messages that a condition chooses
        raise _Unclear
    return _Loop(iterable) if isinstance(iterable, _Turns) else LoopContext(iterable, *arguments)
