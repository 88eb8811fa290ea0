"""The queue before a model, and the thread that decodes the answers of several requests at once.

A request joins between two tokens as soon as there is room for its answers, and leaves when they
are complete; none overtakes another. One that is cancelled leaves at once, also from the queue.
Invariant: only this thread uses the model, and each request gets exactly one end.
"""

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from torch import nn

from forescale.inference.generation import Answer, ContinuousBatch
from forescale.serving.request import Refused

Event = tuple[int, str] | Exception | None  # a piece of an answer, by its number; None: the end


class Generation:
    """The answers to one request. deliver: takes each event, in the decoding thread."""

    def __init__(self, answers: Sequence[Answer], deliver: Callable[[Event], None]):
        self.answers, self.deliver = answers, deliver
        self.is_cancelled = False


class Scheduler:
    """The queue of a model. batch: the most answers that are decoded at once; max_waiting: the most
    requests in the queue."""

    def __init__(self, model: nn.Module, batch: int, max_waiting: int):
        self.batch, self.max_waiting = batch, max_waiting
        self._decoding = ContinuousBatch(model)
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._changed = threading.Condition()
        self._is_open = True
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)
        self._thread.start()

    def refuse_if_full(self) -> None:
        """Raise Refused if the queue is full."""
        if len(self._waiting) >= self.max_waiting:
            message = f"{self.max_waiting} requests are waiting; try again later."
            raise Refused(429, message, code="queue_full")

    def submit(self, generation: Generation) -> None:
        """Put a request at the end of the queue. Raises Refused if that is full."""
        with self._changed:
            if not self._is_open:
                raise _stopping()
            self.refuse_if_full()
            self._waiting.append(generation)
            self._changed.notify()

    def cancel(self, generation: Generation) -> None:
        """Nobody waits for this request any more: take it from the queue, or end its answers."""
        with self._changed:
            generation.is_cancelled = True
            if generation in self._waiting:
                self._waiting.remove(generation)

    def close(self) -> None:
        """Decode no more; requests that are not complete end with an error."""
        with self._changed:
            self._is_open = False
            self._changed.notify()

    def _work(self) -> None:
        while self._is_open:
            with self._changed:
                if not self._running:
                    self._changed.wait_for(lambda: self._waiting or not self._is_open)
                room = self.batch - len(self._decoding.answers)
                while self._is_open and self._waiting and len(self._waiting[0].answers) <= room:
                    generation = self._waiting.popleft()
                    room -= len(generation.answers)
                    self._running.append(generation)
                    self._decoding.add(generation.answers)
            try:
                self._step()
            except Exception as e:
                traceback.print_exc(file=sys.stderr)
                for generation in self._running:
                    generation.deliver(e)
                self._running, self._decoding = [], ContinuousBatch(self._decoding.model)
        with self._changed:
            for generation in (*self._running, *self._waiting):
                generation.deliver(_stopping())

    def _step(self) -> None:
        """Decode a token of each answer, and let go the requests that are complete."""
        owners = {id(a): (g, i) for g in self._running for i, a in enumerate(g.answers)}
        for generation in self._running:
            if generation.is_cancelled:
                for answer in generation.answers:
                    answer.reason = answer.reason or "length"
        for answer, piece in self._decoding.step():
            generation, number = owners[id(answer)]
            generation.deliver((number, piece))
        complete = [g for g in self._running if all(answer.reason for answer in g.answers)]
        self._running = [g for g in self._running if g not in complete]
        for generation in complete:
            generation.deliver(None)


def _stopping() -> Refused:
    return Refused(503, "The server stops.", code="stopping")
