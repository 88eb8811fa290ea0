"""What a request asks for: the body of a completion or of a chat, checked.

Invariant: a parameter that would change the answer is obeyed or refused, never ignored; every
refusal has the form of OpenAI's errors and names the parameter.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forescale.inference.writing import Wanted
from forescale.models.decoding.sampler import Sampler

Messages = Sequence[Mapping[str, str]]  # of a chat: role and content
_IGNORED = {"user", "metadata", "store", "safety_identifier"}  # they don't change the answer
# What we lack, with the value that asks for nothing.
_NEUTRAL: dict[str, Any] = {
    "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {},
    "logprobs": False, "top_logprobs": 0, "suffix": "", "tools": [], "functions": [],
    "tool_choice": "none", "response_format": {"type": "text"}, "echo": False,
}  # fmt: skip
_OWN = {
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "n", "stop", "stream", "stream_options", "seed",
}  # fmt: skip
_MOST_STOPS = 16
_LONGEST_STOP = 1000  # characters


class Refused(Exception):
    """A request that isn't answered. status: of HTTP; param: the parameter in question."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = ""):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or None

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's API has it."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        facts = {"message": str(self), "type": kinds.get(self.status, usual)}
        return {"error": {**facts, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask for: tokens of an answer, answers."""

    num_tokens: int
    answers: int


@dataclass(frozen=True)
class Asked:
    """A request: prompts, texts or the messages of a chat, `samples` answers to each, and how they
    are written; answer number i draws with seed + i."""

    prompts: Sequence[str | Messages]
    samples: int
    wanted: Wanted
    seed: int
    streams: bool
    counts: bool  # the usage, at the end of a stream
    is_chat: bool


def asked(body: Any, name: str, limits: Limits, is_chat: bool = False) -> Asked:
    """Return what the body of a request asks of the model `name`: a completion, or the next message
    of a chat. Raises Refused."""
    if not isinstance(body, dict):
        raise Refused(400, "The body must be a JSON object.")
    found = {key: value for key, value in body.items() if value is not None}
    _refuse_others(found)
    if found.get("model", name) != name:
        message = f"The model {found['model']!r} does not exist; this server has {name!r}."
        raise Refused(404, message, "model", "model_not_found")
    prompts = [messages_of(found)] if is_chat else _prompts(found)
    samples = _number(found, "n", 1, int, 1, limits.answers)
    if samples * len(prompts) > limits.answers:
        message = f"{samples * len(prompts)} answers are asked for; at most {limits.answers}."
        raise Refused(400, message, "n")
    most = limits.num_tokens if is_chat else 16  # the second is OpenAI's default
    key = "max_completion_tokens" if "max_completion_tokens" in found else "max_tokens"
    num_tokens = _number(found, key, min(most, limits.num_tokens), int, 1, limits.num_tokens)
    sampler = Sampler(
        temperature=_number(found, "temperature", 1.0, float, 0, 2),
        top_k=_number(found, "top_k", 0, int, 0, 2**31) or None,
        top_p=_number(found, "top_p", 1.0, float, 1e-6, 1),
        min_p=_number(found, "min_p", 0.0, float, 0, 1),
        repetition_penalty=_number(found, "repetition_penalty", 1.0, float, 1e-3, 1e3),
    )
    options = found.get("stream_options", {})
    return Asked(
        prompts,
        samples,
        Wanted(num_tokens, sampler, _stops(found)),
        _number(found, "seed", secrets.randbits(31), int, -(2**62), 2**62) % 2**62,
        _truth(found, "stream"),
        isinstance(options, dict) and options.get("include_usage") is True,
        is_chat,
    )


def messages_of(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the messages of a chat, each with a role and a text. Raises Refused."""
    messages = found.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "`messages` must be a list with a message.", "messages")
    made = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            problem = "must be an object whose role is system, user or assistant."
            raise Refused(400, f"Message {i} {problem}", f"messages[{i}].role")
        content = message.get("content")
        if isinstance(content, list):  # of parts
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            whole = all(isinstance(text, str) for text in texts)
            content = "".join(map(str, texts)) if whole else None
        if not isinstance(content, str):
            raise Refused(400, f"Message {i} has no text.", f"messages[{i}].content")
        made.append({"role": role, "content": content})
    return made


def _refuse_others(found: Mapping[str, Any]) -> None:
    """Raise Refused for a parameter that isn't known, or asks for what we lack."""
    for key in found.keys() - _OWN - _IGNORED:
        if key not in _NEUTRAL:
            raise Refused(400, f"Unknown parameter: {key!r}.", key, "unknown_parameter")
        if found[key] not in (_NEUTRAL[key], [], {}):
            message = f"This server does not support {key!r}; leave it out."
            raise Refused(400, message, key, "unsupported_parameter")


def _prompts(found: Mapping[str, Any]) -> Sequence[str]:
    prompt = found.get("prompt", "")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    is_texts = isinstance(prompts, list) and all(isinstance(text, str) for text in prompts)
    if not is_texts or not prompts:
        raise Refused(400, "`prompt` must be a text or a list of texts.", "prompt")
    return prompts


def _number(
    found: Mapping[str, Any], key: str, default: Any, kind: type, least: float, most: float
) -> Any:
    value = found.get(key, default)
    is_kind = isinstance(value, int) or (kind is float and isinstance(value, float))
    if not is_kind or isinstance(value, bool) or not least <= value <= most:
        problem = "a whole number" if kind is int else "a number"
        raise Refused(400, f"{key!r} must be {problem} from {least:g} to {most:g}.", key)
    return kind(value)


def _truth(found: Mapping[str, Any], key: str) -> bool:
    value = found.get(key, False)
    if not isinstance(value, bool):
        raise Refused(400, f"{key!r} must be true or false.", key)
    return value


def _stops(found: Mapping[str, Any]) -> tuple[str, ...]:
    stop = found.get("stop", [])
    texts = [stop] if isinstance(stop, str) else stop
    fits = isinstance(texts, list) and len(texts) <= _MOST_STOPS
    if not fits or not all(isinstance(t, str) and 0 < len(t) <= _LONGEST_STOP for t in texts):
        problem = f"a text or at most {_MOST_STOPS} texts, none empty or beyond {_LONGEST_STOP:,}"
        raise Refused(400, f"`stop` must be {problem} characters.", "stop")
    return tuple(texts)
