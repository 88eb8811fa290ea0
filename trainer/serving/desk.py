"""The desk: requests wait in order, and one thread writes the answers of several at once.

A request joins between two tokens as soon as there is room for its answers, and leaves when they
are complete; none overtakes another.
Invariant: only this thread uses the model and the tokenizer, and no request is left without an end.
"""

import queue
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable

from torch import nn

from forescale.inference.writing import Answer, Writing
from forescale.serving.asked import Refused

Event = tuple[int, str] | Exception | None  # a piece of an answer, by its number; None: the end


class Ticket:
    """A request at the desk. count: its answers; begin: makes them, in the desk's thread; events:
    what comes."""

    def __init__(self, count: int, begin: Callable[[], list[Answer]]):
        self.count, self.begin = count, begin
        self.answers: list[Answer] = []
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.is_cancelled = False

    def cancel(self) -> None:
        """Nobody waits any more: its answers leave their batch."""
        self.is_cancelled = True


class Desk:
    """The queue before a model. batch: the most answers that are written at once; most: the most
    requests that wait."""

    def __init__(self, model: nn.Module, batch: int, most: int):
        self.batch, self.most = batch, most
        self._writing = Writing(model)
        self._waiting: deque[Ticket] = deque()
        self._open: list[Ticket] = []  # those whose answers are being written
        self._changed = threading.Condition()
        self._is_open = True
        self._thread = threading.Thread(target=self._work, name="desk", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Put a request at the end of the queue. Raises Refused if that is full."""
        with self._changed:
            if len(self._waiting) >= self.most:
                message = f"{self.most} requests are waiting; try again later."
                raise Refused(429, message, code="queue_full")
            self._waiting.append(ticket)
            self._changed.notify()

    def close(self) -> None:
        """Take no more from the queue, and write no more."""
        with self._changed:
            self._is_open = False
            self._changed.notify()

    def _work(self) -> None:
        while self._is_open:
            for ticket in self._joining():
                if _is_begun(ticket):
                    self._open.append(ticket)
                    self._writing.add(ticket.answers)
            try:
                self._write()
            except Exception as e:
                traceback.print_exc(file=sys.stderr)
                for ticket in self._open:
                    ticket.events.put(e)
                self._open, self._writing = [], Writing(self._writing.model)
        for ticket in (*self._open, *self._waiting):
            ticket.events.put(Refused(503, "The server stops.", code="stopping"))

    def _joining(self) -> list[Ticket]:
        """Return the next requests for whose answers there is room, all of them taken from the
        queue; where nothing is written, wait for one."""
        with self._changed:
            if not self._open:
                self._changed.wait_for(lambda: self._waiting or not self._is_open)
            room, found = self.batch - len(self._writing.answers), list[Ticket]()
            while self._is_open and self._waiting and self._waiting[0].count <= room:
                found.append(self._waiting.popleft())
                room -= found[-1].count
            return found

    def _write(self) -> None:
        """Write a token of each answer, and let go the requests whose answers are complete."""
        owners = {id(a): (t, i) for t in self._open for i, a in enumerate(t.answers)}
        for ticket in self._open:
            if ticket.is_cancelled:
                for answer in ticket.answers:
                    answer.reason = answer.reason or "length"
        for answer, piece in self._writing.step():
            ticket, number = owners[id(answer)]
            ticket.events.put((number, piece))
        ended = [t for t in self._open if all(answer.reason for answer in t.answers)]
        for ticket in ended:
            ticket.events.put(None)
        self._open = [ticket for ticket in self._open if ticket not in ended]


def _is_begun(ticket: Ticket) -> bool:
    """Make the answers of a request; False if nobody waits for them, or they can't be made."""
    if ticket.is_cancelled:
        return False
    try:
        ticket.answers = ticket.begin()
    except Exception as e:  # of this request alone
        ticket.events.put(e)
        return False
    return True
