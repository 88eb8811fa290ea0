"""A conversation divided into pieces by a chat template, read and learned in turn.

Invariant: the pieces are those of a rendering of each beginning of the conversation, which takes
quadratic time; of a template that leaves to the next message no more than namespaces hold, two
passes show the same (`_Pass`). Jinja's sandbox gives a template no files and no objects.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from types import GeneratorType
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_GROWTH, _SPARE = 16, 1 << 10  # times the bytes of messages, and of each so many more
_REASON = 300  # characters of a template's own message
_SHORT = 4  # responses of a conversation that is rendered anew for each

# Of a template of these alone, a turn of a loop leaves to the next one output and namespaces alone.
_NODES = {
    *("Template", "Output", "TemplateData", "Name", "Const", "If", "For", "Assign", "Getattr"),
    *("Getitem", "Slice", "Call", "Keyword", "Filter", "Test", "Compare", "Operand", "And", "Or"),
    *("Not", "Add", "Sub", "Mul", "Mod", "Neg", "Concat", "CondExpr", "List", "Break", "Continue"),
    *("NSRef", "Tuple", "Dict", "Pair"),
}
_FILTERS = {
    *("trim", "upper", "lower", "capitalize", "title", "string", "tojson", "length", "count"),
    *("default", "d", "replace", "int", "list", "join"),
}
# Iterators, which `list` uses up, and a function: fine only where they are read or called at once.
_PLACED = {"select", "reject", "selectattr", "rejectattr", "items", "namespace"}
_STATEFUL = {"cycler", "joiner", "lipsum", "dict", "self", "caller"}

Message = Mapping[str, Any]  # role and content; tool_calls; of the first one, tools


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
        self._tools = dict[str, Any]()  # of the conversation

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
        prompt, whole = _Pass(messages, 0, last, None), _Pass(messages, 0, last + 1, None)
        self._run(prompt, True)
        self._run(whole, False)
        head, text, starts = prompt.text, whole.text, whole.walks[-1].starts
        alike = text.startswith(head[: prompt.walks[-1].starts.get(last - 1)])
        if not alike or starts != {**prompt.walks[-1].starts, last: starts.get(last)}:
            raise _Unclear
        if not {i for r in responses for i in (r - 1, r)} <= starts.keys():
            raise _Unclear

        def end(count: int, model: _Pass, is_prompt: bool) -> str:
            """Return what the first messages end with, from the last of them on."""
            one = _Pass(messages, count - 1, count, model)
            self._run(one, is_prompt)
            size = model.walks[-1].size
            if one.text[:size] != model.text[:size] or len(one.walks) != len(model.walks):
                raise _Unclear
            return one.text[one.walks[-1].size :]

        cut = 0
        for i in responses:
            before = head[cut : starts[i - 1]] + end(i, prompt, True)
            yield cut, before, text[cut : starts[i]] + end(i + 1, whole, False)
            cut = starts[i - 1]

    def _run(self, one: "_Pass", is_prompt: bool) -> None:
        """Run the template for a pass."""
        assert self._single_pass is not None
        self._pass = one
        try:
            one.text = self._text(self._single_pass, _Turns(one), is_prompt, one)
        except Refusal as e:  # of these messages: any other error may be one of the pass alone
            raise _unfit(e) from e
        except Exception as e:
            raise (e if isinstance(e, Unfit | MemoryError) else _Unclear()) from e

    def _rendered(self, messages: Sequence[Message], is_prompt: bool) -> str:
        template = self._template
        try:
            return self._text(template, messages, is_prompt, _Pass(messages, 0, 0, None))
        except (Unfit, MemoryError):
            raise
        except Exception as e:
            raise _unfit(e) from e

    def _begin(self, messages: Sequence[Message]) -> None:
        """Set the limit of texts. Raises Unfit where a message spells a special token: it would
        become that token, and a user could end a turn, or write one of the assistant's."""
        others = [{k: v for k, v in m.items() if k not in ("role", "content")} for m in messages]
        texts = [
            m["content"] + (json.dumps(o, ensure_ascii=False) if o else "")
            for m, o in zip(messages, others, strict=True)
        ]
        self._tools = {k: v for m in messages[:1] for k, v in m.items() if k == "tools"}
        self._most = _GROWTH * sum(len(text) + _SPARE for text in texts)
        if any(token in text for token in self.special for text in texts):
            raise Unfit("with a special token in a message")

    def _text(self, template: Template, messages: Any, is_prompt: bool, one: "_Pass") -> str:
        names = {
            **self.tokens,
            **self._tools,
            "messages": messages,
            "add_generation_prompt": is_prompt,
        }
        texts, size = list[str](), 0
        one.render = template.root_render_func(template.new_context(names))
        for text in one.render:
            texts.append(text)
            size += len(text.encode())  # fails for half a character, which no tokenizer reads
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
        tree = self._environment.parse(self.source)
        places = {id(part) for f in tree.find_all(nodes.For) for part in (f.iter, f.target)}
        readers: Iterator[Any] = tree.find_all((nodes.Filter, nodes.Call))
        places |= {id(r.node) for r in readers if getattr(r, "name", "list") in ("list", "join")}
        for node in tree.find_all(nodes.Node):
            is_stateless = type(node).__name__ in _NODES and not getattr(node, "dyn_args", None)
            if isinstance(node, nodes.Tuple) or getattr(node, "name", None) in _PLACED:
                is_stateless &= id(node) in places
            elif isinstance(node, nodes.Filter):
                is_stateless &= node.name in _FILTERS
            elif isinstance(node, nodes.Name):
                is_stateless &= node.name not in _STATEFUL
            elif isinstance(node, nodes.For):
                is_stateless &= not (node.recursive or node.else_)
            if not is_stateless:
                return None

        def namespace(*arguments: Any, **attributes: Any) -> Namespace:
            self._pass.spaces.append(Namespace(*arguments, **attributes))
            return self._pass.spaces[-1]

        template = self._environment.from_string(self.source, {"namespace": namespace})
        template.root_render_func.__globals__["LoopContext"] = _loop
        return template


class _Unclear(BaseException):
    """A pass doesn't show what a template does. No test of Jinja's catches it, as `is sequence`
    does exceptions."""


class _Walk(NamedTuple):
    """A loop of a pass. place: where it begins, with which variables; size: of the text there;
    starts, states: the size of the text and the attributes of namespaces before each message."""

    place: Any
    size: int
    starts: dict[int, int]
    states: dict[int, list[dict[str, Any]]]


class _Pass:
    """The messages from `begin` to `end`, where the conversation seems to end.

    Take a template whose turns of a loop leave only namespaces to the next one (see _NODES) and, at
    each message, looks no further than the next one. Of the first k messages it writes what it
    writes of all of them before the last of the k, and then what a pass over that one message
    writes, with the namespaces that those before leave. So a pass from 0, the model, and one over
    each message show the renderings of all beginnings. Of several loops only the last may write,
    and all begin as in the model.
    """

    def __init__(self, messages: Sequence[Message], begin: int, end: int, model: "_Pass | None"):
        self.messages, self.begin, self.end, self.model = messages, begin, end, model
        self.at, self.is_walking, self.is_over, self.size, self.text = -1, False, False, 0, ""
        self.render: Any = None
        self.spaces, self.walks = list[Any](), [_Walk(None, 0, {}, {})]

    def walk(self, first: int) -> Iterator[Message]:
        """Loop over the messages from `first` on."""
        frame, reader = self.render.gi_frame, sys._getframe(1).f_code.co_filename
        is_loop = reader in {frame.f_code.co_filename, LoopContext.__next__.__code__.co_filename}
        is_silent = not any({*walk.starts.values()} - {walk.size} for walk in self.walks)
        variables = {n: self._form(v) for n, v in frame.f_locals.items() if n.startswith("l_")}
        place = frame.f_lasti, first, variables, repr(self._state())
        twin = self.model.walks[len(self.walks)] if self.model else _Walk(place, 0, {}, {})
        if self.is_walking or not (is_loop and is_silent) or place != twin.place:
            raise _Unclear
        state = twin.states.get(self.begin, self._state())
        for space, attributes in zip(self.spaces, state, strict=True):
            space._Namespace__attrs = {**attributes}
        self.walks.append(walk := _Walk(place, self.size, {}, {}))
        self.is_walking, self.is_over = True, False
        for i in range(max(self.begin, first), self.end):
            self.at, walk.starts[i], walk.states[i] = i, self.size, self._state()
            yield self.messages[i]
        self.is_walking, self.is_over = False, True

    def _state(self) -> list[dict[str, Any]]:
        state = [{**space._Namespace__attrs} for space in self.spaces]
        if not all(isinstance(v, str | int | float | None) for one in state for v in one.values()):
            raise _Unclear
        return state

    def _form(self, value: Any) -> Any:
        """Return a variable of a template in a form that is equal in other passes."""
        if isinstance(value, Namespace):
            return [value is space for space in self.spaces]
        if isinstance(value, _Turns):
            return (value._first,)
        form = repr(value)
        return _unclear() if "<Namespace" in form or "<LoopContext" in form else form


def _unclear(*_: Any) -> Any:
    raise _Unclear


class _Turns:
    """The messages of a pass from one on, as a template sees them. All else is _Unclear."""

    def __init__(self, one: _Pass, first: int = 0):
        self._pass, self._first = one, first

    def __iter__(self) -> Iterator[Message]:
        return self._pass.walk(self._first)

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


class _Loop(LoopContext):
    """The variable `loop` in a pass."""

    _peek_next = previtem = changed = property(_unclear)
    __repr__ = _unclear
    last = property(lambda self: self._iterable._pass.at == self._iterable._pass.end - 1)


def _loop(iterable: Any, *arguments: Any) -> LoopContext:
    if isinstance(iterable, GeneratorType):  # the messages that a condition chooses
        raise _Unclear
    if not isinstance(iterable, _Turns):
        return LoopContext(iterable, *arguments)
    loop = _Loop(iterable, *arguments)
    loop.index0 += max(iterable._pass.begin - iterable._first, 0)
    return loop
