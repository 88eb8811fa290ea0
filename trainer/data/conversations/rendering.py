"""A chat template at work, in a process of its own.

Invariant: whatever a template does (it may come from a download), its process ends after some
seconds of a processor, or at _MEMORY bytes, and the caller gets a sentence.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from forescale.data.conversations.division import Broken, Division, Message, Piece, Unfit

# Of a processor, for a conversation: of training, and of one whose client waits for an answer.
_SECONDS, _PROMPT_SECONDS = 10.0, 3.0
_MEMORY = 1 << 30  # bytes of address space
_BOOT = "from forescale.data.conversations.rendering import serve; serve()"


class Renderer:
    """The process of a template. source, special, tokens: see ChatTemplate."""

    def __init__(self, source: str, special: Sequence[str], tokens: Mapping[str, str]):
        self._job = source, special, tokens
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], Any] = lambda: None

    def pieces(
        self, conversations: Sequence[Sequence[Message]], is_prompt: bool
    ) -> list[list[Piece] | Unfit]:
        """Return the pieces of each conversation, or why it has none. is_prompt: up to where the
        model writes the next response, else up to the last one. Raises Broken."""
        try:
            if self._process is None:
                self._process = self._started()
                self._send(self._job)
            seconds = _PROMPT_SECONDS if is_prompt else _SECONDS
            self._send((is_prompt, seconds, conversations))
            return [self._answer(len(messages), seconds) for messages in conversations]
        except BaseException:  # also Ctrl-C: no later call may read the rest of these answers
            self._end()
            self._process = None
            raise

    def _started(self) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C reaches only the parent
        )
        self._end = weakref.finalize(self, _end, process)
        return process

    def _send(self, message: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then the next answer is missing, too
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _answer(self, messages: int, seconds: float) -> list[Piece] | Unfit:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line.endswith(b"\n"):
            kind, value = json.loads(line)
            if kind == "broken":
                raise Broken(value)
            return Unfit(value) if kind == "unfit" else [Piece(*piece) for piece in value]
        code = self._process.wait()
        if code == -signal.SIGPROF:
            count = f"{messages:,} message{'s' * (messages != 1)}"
            raise Broken(f"needs more than {seconds:g} s of a processor to write {count}")
        end = signal.Signals(-code).name if code < 0 else f"code {code}"
        raise Broken(f"ends the process that renders it ({end})")


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # of what the process didn't read any more
            assert pipe is not None
            pipe.close()


def serve() -> None:
    """Main loop of the process: read batches of conversations, until its parent ends."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends this process within any function
    with suppress(ValueError, OSError):  # not on every system
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    division = Division(*json.loads(sys.stdin.buffer.readline()))
    for line in sys.stdin.buffer:
        is_prompt, seconds, conversations = json.loads(line)
        for messages in conversations:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            answer = json.dumps(_answer(division, messages, is_prompt))
            signal.setitimer(signal.ITIMER_PROF, 0)
            sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _answer(
    division: Division, messages: Sequence[Message], is_prompt: bool
) -> tuple[str, list[Piece] | str]:
    try:
        return "pieces", division.prompt(messages) if is_prompt else division.turns(messages)
    except Unfit as e:
        return "unfit", str(e)
    except Broken as e:
        return "broken", str(e)
    except MemoryError:
        return "broken", f"needs more than {_MEMORY >> 20:,} MiB of memory"
