"""A request: the body of a completion or of a chat, validated.

Invariant: a parameter that would change the answer is obeyed or refused, never ignored; every
refusal has the form of OpenAI's errors and names the parameter.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from forescale.inference.generation import GenerationConfig
from forescale.models.decoding.sampler import Sampler

Messages = Sequence[Mapping[str, str]]  # of a chat: role and content
Prompt = str | tuple[int, ...] | Messages
_IGNORED = {"user", "metadata", "store", "safety_identifier"}  # they don't change the answer
# Parameters of OpenAI's that this server lacks, each with the value that changes nothing.
_NEUTRAL: dict[str, Any] = {
    "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {},
    "suffix": "", "tools": [], "functions": [], "tool_choice": "none",
    "response_format": {"type": "text"},
}  # fmt: skip
_SUPPORTED = {
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "n", "stop", "stream", "stream_options", "seed",
    "logprobs", "top_logprobs", "echo",
}  # fmt: skip
_MAX_LIKELIEST = 20  # tokens of a place whose log probabilities are shown
_MAX_STOPS = 16
_MAX_STOP_LENGTH = 1000  # characters


class Refused(Exception):
    """A request that isn't answered. status: of HTTP; param: the parameter in question."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = ""):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or None

    def body(self) -> dict[str, Any]:
        """Return the error in the form of OpenAI's API."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        facts = {"message": str(self), "type": kinds.get(self.status, usual)}
        return {"error": {**facts, "param": self.param, "code": self.code}}


def too_long(tokens: str, context: int) -> Refused:
    """Return the error for a prompt of more tokens than the model reads."""
    message = f"The prompt has {tokens} tokens, and the model reads {context:,}."
    return Refused(400, message, "prompt", "context_length_exceeded")


@dataclass(frozen=True)
class Limits:
    """The most tokens of an answer, and the most answers to one request."""

    num_tokens: int
    answers: int


@dataclass(frozen=True)
class CompletionRequest:
    """A valid request. Each prompt, a text, its ids or the messages of a chat, gets `samples`
    answers; answer number i draws with seed + i."""

    prompts: Sequence[Prompt]
    samples: int
    generation: GenerationConfig
    seed: int
    is_stream: bool
    has_usage: bool  # at the end of a stream
    is_chat: bool


def parse_json(raw: bytes) -> Any:
    """Return the value of a JSON text. Raises Refused, also for a lone surrogate, which no
    tokenizer reads, and for NaN, which isn't JSON."""

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(raw.decode(), parse_constant=refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # raises for a lone surrogate
    except (ValueError, RecursionError):
        raise Refused(400, "The body is not valid JSON.") from None
    return value


def parse_request(body: Any, name: str, limits: Limits, is_chat: bool = False) -> CompletionRequest:
    """Return the request to the model `name` that a body makes: a completion, or the next message
    of a chat. Raises Refused."""
    if not isinstance(body, dict):
        raise Refused(400, "The body must be a JSON object.")
    params = {key: value for key, value in body.items() if value is not None}
    for key in params.keys() - _SUPPORTED - _IGNORED:
        if key not in _NEUTRAL:
            raise Refused(400, f"Unknown parameter: {key!r}.", key, "unknown_parameter")
        if params[key] not in (_NEUTRAL[key], [], {}):
            message = f"This server does not support {key!r}; leave it out."
            raise Refused(400, message, key, "unsupported_parameter")
    if params.get("model", name) != name:
        message = f"The model {params['model']!r} does not exist; this server has {name!r}."
        raise Refused(404, message, "model", "model_not_found")
    prompts: Any
    if is_chat:
        prompts = [parse_messages(params)]
    else:
        prompts = _prompts(params.get("prompt", ""))
    samples = _number(params, "n", 1, int, 1, limits.answers)
    if samples * len(prompts) > limits.answers:
        count = samples * len(prompts)
        raise Refused(400, f"The request has {count} answers; at most {limits.answers}.", "n")
    default = limits.num_tokens if is_chat else 16  # the second is OpenAI's
    key = "max_completion_tokens" if "max_completion_tokens" in params else "max_tokens"
    default = min(default, limits.num_tokens)
    echo = params.get("echo", False)
    if not isinstance(echo, bool) or (echo and is_chat):
        raise Refused(400, "'echo' must be true or false, and a chat has none.", "echo")
    num_tokens = _number(params, key, default, int, 0 if echo else 1, limits.num_tokens)
    sampler = Sampler(
        temperature=_number(params, "temperature", 1.0, float, 0, 2),
        top_k=_number(params, "top_k", 0, int, 0, 2**31) or None,
        top_p=_number(params, "top_p", 1.0, float, 1e-6, 1),
        min_p=_number(params, "min_p", 0.0, float, 0, 1),
        repetition_penalty=_number(params, "repetition_penalty", 1.0, float, 1e-3, 1e3),
    )
    stream_options, is_stream = params.get("stream_options", {}), params.get("stream", False)
    if not isinstance(is_stream, bool):
        raise Refused(400, "'stream' must be true or false.", "stream")
    return CompletionRequest(
        prompts,
        samples,
        GenerationConfig(num_tokens, sampler, _stops(params), _logprobs(params, is_chat), echo),
        _number(params, "seed", secrets.randbits(31), int, -(2**62), 2**62) % 2**62,
        is_stream,
        isinstance(stream_options, dict) and stream_options.get("include_usage") is True,
        is_chat,
    )


def _prompts(prompt: Any) -> list[Prompt]:
    """Return the prompts of a completion: a text, token ids, or several of either."""

    def is_ids(x: Any) -> bool:
        return isinstance(x, list) and bool(x) and all(type(i) is int for i in x)

    prompts = [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt
    each = prompts if isinstance(prompts, list) else []
    if not each or not all(isinstance(x, str) or is_ids(x) for x in each):
        message = "`prompt` must be a text, a list of token ids, or a list of several of them."
        raise Refused(400, message, "prompt")
    return [x if isinstance(x, str) else tuple(x) for x in each]


def _logprobs(params: Mapping[str, Any], is_chat: bool) -> int | None:
    """Return how many of the likeliest tokens are shown beside each token; None: no log
    probabilities. A chat says by `logprobs` whether, and by `top_logprobs` how many."""
    if not is_chat:
        if params.get("logprobs", False) is False:
            return None
        return int(_number(params, "logprobs", 0, int, 0, _MAX_LIKELIEST))
    if not isinstance(params.get("logprobs", False), bool):
        raise Refused(400, "'logprobs' of a chat must be true or false.", "logprobs")
    count = int(_number(params, "top_logprobs", 0, int, 0, _MAX_LIKELIEST))
    return count if params.get("logprobs", False) else None


def parse_messages(params: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the messages of a chat, each with a role and a text. Raises Refused."""
    messages = params.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "`messages` must be a list with a message.", "messages")
    parsed = []
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
        parsed.append({"role": role, "content": content})
    return parsed


def _number(
    params: Mapping[str, Any], key: str, default: Any, kind: type, minimum: float, maximum: float
) -> Any:
    value = params.get(key, default)
    is_kind = isinstance(value, int) or (kind is float and isinstance(value, float))
    if not is_kind or isinstance(value, bool) or not minimum <= value <= maximum:
        noun = "a whole number" if kind is int else "a number"
        raise Refused(400, f"{key!r} must be {noun} from {minimum:g} to {maximum:g}.", key)
    return kind(value)


def _stops(params: Mapping[str, Any]) -> tuple[str, ...]:
    stop = params.get("stop", [])
    texts = [stop] if isinstance(stop, str) else stop
    fits = isinstance(texts, list) and len(texts) <= _MAX_STOPS
    if not fits or not all(isinstance(t, str) and 0 < len(t) <= _MAX_STOP_LENGTH for t in texts):
        lengths = f"none empty or longer than {_MAX_STOP_LENGTH:,} characters"
        raise Refused(
            400, f"`stop` must be a text or at most {_MAX_STOPS} texts, {lengths}.", "stop"
        )
    return tuple(texts)
