"""A verb from Python: its command, with --json, in a process of its own.

Invariant: a call is the command of the same words: same config, ranks, locks, resuming. This
process imports no torch for it, and ends no sooner than a run has saved. A problem of the user's is
the UserError that the command reports.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any, NamedTuple

from forescale.config.job import Job, words_of
from forescale.config.schema import ConfigError, Problem
from forescale.ground.document import FLAG
from forescale.ground.errors import DONE, INTERRUPTED, USER, CommandFailed, Interrupted, UserError
from forescale.ground.processes import die_with_parent
from forescale.resilience.cell_class import with_names

_LINES = 20  # of the output that an error repeats
_PAUSE = 0.5  # seconds: a command ends so soon after it has printed its error
_ERROR = "forescale: "  # before the sentence of an error
Show = Callable[[str], object]
See = Callable[[Mapping[str, Any]], object]


class CommandResult(NamedTuple):
    """A command that has ended. facts: the fields of its document, or of all its lines together;
    lines: the last ones of its output for people."""

    code: int
    facts: dict[str, Any]
    lines: list[str]

    def result(self) -> dict[str, Any]:
        """Return the facts. Raises UserError for what the user can correct, Interrupted after an
        interrupt, CommandFailed if the command failed."""
        if self.code == USER and (error := self.facts.get("error")):
            problems = [Problem(*_parts(problem)) for problem in error.get("problems", ())]
            raise ConfigError(problems) if problems else UserError(*_parts(error))
        if self.code == INTERRUPTED:
            raise Interrupted(
                "a run that was training is saved; make the same call again to continue"
            )
        if self.code != DONE:
            raise CommandFailed(self.code, self.lines)
        return self.facts


def arguments(
    schema: type[Job], named: Mapping[str, Any], words: Sequence[str], keys: Mapping[str, Any]
) -> list[str]:
    """Return the words of a command. named: keys that a function has as arguments; the words and
    the keys stand behind them. Raises UserError for values that no command line can have."""
    for word in words:
        if not isinstance(word, str):
            todo = f'write such as {schema.VERB}("experiment=quick")'
            raise UserError(repr(word), "is no word of a command line", todo)
    first, last = words_of(named, schema=schema), words_of(with_names(keys), schema=schema)
    return [*first, *words, *last]


def call(
    verb: str, words: Sequence[str], show: Show, see: See = lambda facts: None
) -> CommandResult:
    """Run a verb with these words until it ends. show: called with each line for people; see: with
    each object for programs. An interrupt (Ctrl-C, the stop button of a notebook) asks the command
    to save and end; a second one ends it at once."""
    command = [sys.executable, "-P", "-m", "forescale", verb, *words, FLAG]
    try:
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # Else Ctrl-C of a terminal would reach the command too, which would count two.
            start_new_session=True,
            # Nor would it see the death of this process: the ranks go with it, and nothing is lost.
            preexec_fn=die_with_parent,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    except (ValueError, OSError) as e:  # a NUL, or more text than a command may have
        raise UserError(verb, f"can't be started with these words ({e})", "correct them") from e
    output = _Output(started, show, see)
    while True:
        try:
            output.follow()
            code = started.wait()
            if code != USER:  # else the error of the call says it
                output.release()
            return CommandResult(code, output.facts, output.last)
        except KeyboardInterrupt:
            started.send_signal(signal.SIGINT)
        except BaseException:  # of show: the command must not go on unseen
            started.terminate()
            started.wait()
            raise


class _Output:
    """What a command prints. facts: as of CommandResult; last: its last lines for people."""

    def __init__(self, started: subprocess.Popen[str], show: Show, see: See):
        self.facts: dict[str, Any] = {}
        self.last: list[str] = []
        self._show, self._see, self._document = show, see, ""
        # Lines since that of an error, which aren't shown if the command ends with it.
        self._held: list[str] = []
        self._held_at = 0.0
        self._lines: SimpleQueue[tuple[bool, str]] = SimpleQueue()
        streams = ((True, started.stdout), (False, started.stderr))
        self._readers = [Thread(target=self._read, args=s, daemon=True) for s in streams]
        for reader in self._readers:
            reader.start()

    def _read(self, is_document: bool, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put((is_document, line))
        self._lines.put((False, ""))  # the end

    def follow(self) -> None:
        """Hand on what is printed until the command ends; again after an interrupt."""
        while any(reader.is_alive() for reader in self._readers) or not self._lines.empty():
            try:
                is_document, line = self._lines.get(timeout=_PAUSE)
            except Empty:
                is_document, line = False, ""
            if is_document:
                self._add(line)
            else:
                self._hand_on(line)

    def _add(self, line: str) -> None:
        self._document += line
        if line.startswith(("{", "}")) and line.endswith("}\n"):  # those between are indented
            facts, self._document = json.loads(self._document), ""
            self.facts |= facts
            self._see(facts)

    def _hand_on(self, line: str) -> None:
        is_late = time.monotonic() > self._held_at + _PAUSE
        if self._held and is_late and "error" not in self.facts:
            self.release()
        if line:
            self.last = [*self.last[1 - _LINES :], line]
            if line.startswith(_ERROR) and not self._held:
                self._held_at = time.monotonic()
            if line.startswith(_ERROR) or self._held:
                self._held.append(line)
            else:
                self._show(line)

    def release(self) -> None:
        """Show the lines that were held back."""
        lines, self._held = self._held, []
        for line in lines:
            self._show(line)


def _parts(error: Mapping[str, str]) -> tuple[str, str, str]:
    return error["subject"], error["problem"], error["todo"]
