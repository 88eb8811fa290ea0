"""Answers as OpenAI's clients read them: one object, or a stream of its parts.

Invariant: the parts of a stream add up to the object, in text, log probabilities and usage.
"""

import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.types import Send

from forescale.inference.generation import Answer
from forescale.inference.logprobs import TokenScore
from forescale.serving.request import CompletionRequest, Refused


class Form:
    """An answer as OpenAI's clients read it: one object, or a stream of its parts."""

    def __init__(self, request: CompletionRequest, name: str):
        self.is_chat, self.has_usage = request.is_chat, request.has_usage
        self.has_logprobs = request.generation.logprobs is not None
        self._sent = Counter[int]()  # scores of each answer that a stream has brought
        self.kind = "chat.completion" if request.is_chat else "text_completion"
        self.part_kind = self.kind + (".chunk" if request.is_chat else "")
        id_ = f"{'chatcmpl' if request.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.head = {"id": id_, "created": int(time.time()), "model": name}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the complete answers."""
        choices = []
        for number, answer in enumerate(answers):
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            text = {"message": message} if self.is_chat else {"text": answer.text}
            logprobs = self._logprobs(answer.scores)
            choices.append(_choice(number, text, answer) | {"logprobs": logprobs})
        return {**self.head, "object": self.kind, "choices": choices, "usage": _usage(answers)}

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        """Return log probabilities as clients read them; None if they aren't wanted."""
        if not self.has_logprobs:
            return None
        if self.is_chat:
            content = [
                _named(s.text, s.logprob or 0.0)
                | {"top_logprobs": [_named(*pair) for pair in s.likeliest]}
                for s in scores
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [s.text for s in scores],
            "token_logprobs": [s.logprob for s in scores],
            "top_logprobs": [dict(s.likeliest) if s.logprob is not None else None for s in scores],
            "text_offset": [s.offset for s in scores],
        }

    def part(
        self, number: int, piece: str | None, answer: Answer, ended: Answer | None = None
    ) -> dict[str, Any]:
        """Return the part that brings a piece of an answer; None begins it, and `ended` ends it."""
        new = answer.scores[self._sent[number] :]  # the decoding thread may add some meanwhile
        self._sent[number] += len(new)
        delta = {"role": "assistant", "content": ""} if piece is None else {"content": piece}
        delta = {} if ended is not None else delta
        text = {"delta": delta} if self.is_chat else {"text": piece or ""}
        logprobs = self._logprobs(new) if new else None
        choices = [_choice(number, text, ended) | {"logprobs": logprobs}]
        usage = {"usage": None} if self.has_usage else {}
        return {**self.head, "object": self.part_kind, "choices": choices, **usage}

    async def stream(
        self,
        answers: Sequence[Answer],
        first: tuple[int, str] | None,
        pieces: AsyncIterator[tuple[int, str]],
        send: Send,
    ) -> None:
        """Send the answers as events, piece by piece."""

        async def event(content: dict[str, Any] | str) -> None:
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            body = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers.append((b"cache-control", b"no-cache"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            for number in range(len(answers) if self.is_chat else 0):
                await event(self.part(number, None, answers[number]))
            if first is not None and first[1]:
                await event(self.part(*first, answers[first[0]]))
            async for number, piece in pieces:
                if piece:
                    await event(self.part(number, piece, answers[number]))
            for number, answer in enumerate(answers):
                await event(self.part(number, "", answer, answer))
            if self.has_usage:
                usage = {"choices": [], "usage": _usage(answers)}
                await event({**self.head, "object": self.part_kind, **usage})
            await event("[DONE]")
        except Refused as e:
            await event(e.body())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _named(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}


def _choice(number: int, text: dict[str, Any], ended: Answer | None) -> dict[str, Any]:
    reason = None if ended is None else "length" if ended.reason == "length" else "stop"
    return {"index": number, **text, "finish_reason": reason}


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    # Answers to one prompt share their question.
    questions = {id(answer.question): answer.question for answer in answers}.values()
    prompt = sum(len(question.source or question.start) for question in questions)
    completion = sum(answer.num_tokens for answer in answers)
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}
