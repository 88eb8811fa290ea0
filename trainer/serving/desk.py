"""The desk: requests wait in order, and one thread answers several of them at once.

Those that wait together and sample alike share a batch; a later one waits until that is written.
Invariant: only this thread uses the model and the tokenizer, and no request is left without an end.
"""

import queue
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from torch import nn

from forescale.inference.writing import Answer, write
from forescale.models.decoding.sampler import Sampler
from forescale.serving.asked import Refused

Event = tuple[int, str] | Exception | None  # a piece of an answer, by its number; None: the end


class Ticket:
    """A request at the desk. begin: makes its answers, in the desk's thread; events: what comes."""

    def __init__(self, sampler: Sampler, count: int, begin: Callable[[], list[Answer]]):
        self.sampler, self.count, self.begin = sampler, count, begin
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
        self.model, self.batch, self.most = model, batch, most
        self._waiting: deque[Ticket] = deque()
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
        """Take no more from the queue."""
        with self._changed:
            self._is_open = False
            self._changed.notify()

    def _work(self) -> None:
        while tickets := self._next():
            try:
                self._answer([ticket for ticket in tickets if _is_begun(ticket)])
            except Exception as e:
                traceback.print_exc(file=sys.stderr)
                for ticket in tickets:
                    ticket.events.put(e)

    def _next(self) -> list[Ticket]:
        """Return the next request and those that can be answered with it; none: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._is_open)
            if not self._is_open:
                return []
            first = self._waiting.popleft()
            found, rest, count = [first], deque[Ticket](), first.count
            for ticket in self._waiting:
                fits = ticket.sampler == first.sampler and count + ticket.count <= self.batch
                (found if fits else rest).append(ticket)
                count += ticket.count if fits else 0
            self._waiting = rest
            return found

    def _answer(self, tickets: Sequence[Ticket]) -> None:
        owners = {id(a): (ticket, i) for ticket in tickets for i, a in enumerate(ticket.answers)}
        answers = [answer for ticket in tickets for answer in ticket.answers]
        if not answers:
            return
        for answer, piece in write(self.model, answers):
            ticket, number = owners[id(answer)]
            ticket.events.put((number, piece))
            if ticket.is_cancelled:
                for other in ticket.answers:
                    other.reason = other.reason or "length"
            if all(other.reason for other in ticket.answers):
                ticket.events.put(None)


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
