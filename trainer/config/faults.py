"""Faults that a run is asked to suffer, in words: KIND@STEP[:rankN][:PLACE].

Invariant: a text is a fault or one sentence that says why not; `read(str(fault)) == fault`. Nothing
acts here: see injector.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from forescale.config.data import Problems
from forescale.config.suggest import nearest_first
from forescale.errors import UserError

KINDS = {
    "kill": "the rank gets SIGKILL",
    "freeze": "the rank gets SIGSTOP: it neither works nor answers",
    "hang": "the training thread sleeps for ever; the process still answers",
    "exit": "the training thread raises an exception",
    "slow": "for 20 steps the rank sleeps 0.1 s a step",
    "nan": "the step's gradient is no number on this rank",
    "spike": "the step's gradient is 1000 times too large on this rank",
    "flip": "one bit of one weight flips in this rank's memory",
    "corrupt": "one bit of the newest published checkpoint flips",
    "enospc": "the next checkpoint of this rank finds the disk full",
}
_PLACED = ("kill", "freeze", "hang", "exit", "slow")
PLACES = (
    *("data", "forward", "backward", "norm", "update"),  # of a step, in their order
    *("word", "evaluation", "checkpoint"),  # after it
    "write",  # of a checkpoint's file, in whatever thread does it
)
_FORM = re.compile(r"([\w-]+)@(\d+)((?::[\w-]+)*)")


@dataclass(frozen=True)
class Fault:
    """Strikes `rank` while it makes `step` (the update that makes it the run's step `step`), when
    it comes to `place`; at place "write", and for corrupt and enospc, at the first chance from that
    step on."""

    kind: str
    step: int
    rank: int = 0
    place: str = "forward"

    def __str__(self) -> str:
        place = "" if self.place == "forward" else f":{self.place}"
        return f"{self.kind}@{self.step}:rank{self.rank}{place}"


def read(text: str) -> Fault:
    """The fault that a text stands for; raises UserError with the sentence."""
    match = _FORM.fullmatch(text.strip())
    kind = match[1] if match else re.split(r"\W", text.strip())[0]
    near = nearest_first(kind, KINDS)[0]
    if not match:
        what = f"{text!r} is not KIND@STEP[:rankN][:PLACE]"
        raise UserError("faults", what, f"write it like {near}@120:rank1")
    if kind not in KINDS:
        others = ", ".join(sorted(KINDS.keys() - {near}))
        todo = f"the nearest is {near}; the others are {others}"
        raise UserError("faults", f"{text!r} is of no known kind", todo)
    if (step := int(match[2])) < 1:
        raise UserError("faults", f"{text!r} never happens", "the first step that is made is 1")
    given: dict[str, str] = {}
    for word in match[3].split(":")[1:]:
        slot = "rank" if re.fullmatch(r"rank\d+", word) else "place"
        if slot in given:
            raise UserError("faults", f"{text!r} names two {slot}s", f"leave out :{word}")
        given[slot] = word
    place = given.get("place", "forward")
    if place not in PLACES:
        near = nearest_first(place, (*PLACES, "rank1"))[0]
        todo = f"the nearest is {near}; places are {', '.join(PLACES)}"
        raise UserError("faults", f"{text!r}: there is no place {place}", todo)
    if "place" in given and kind not in _PLACED:
        what = f"{text!r}: {kind} has a place of its own"
        raise UserError("faults", what, f"leave out :{place}")
    return Fault(kind, step, int(given.get("rank", "rank0").removeprefix("rank")), place)


def problems(faults: Sequence[str], ranks: int | None = None, steps: int | None = None) -> Problems:
    """What is wrong with a run's list of faults, a sentence each. ranks, steps: of the run, where
    they are known."""
    found: Problems = []
    seen: set[Fault] = set()
    for text in faults:
        try:
            fault = read(text)
        except UserError as e:
            found.append((e.where, e.what, e.todo))
            continue
        if fault in seen:
            what, todo = "stands twice; a fault happens once a run", "give another step or rank"
            found.append(("faults", f"{text!r} {what}", todo))
        seen.add(fault)
        if ranks is not None and fault.rank >= ranks:
            last = f"choose a rank from 0 to {ranks - 1}, or more ranks" if ranks > 1 else "take 0"
            found.append(("faults", f"{text!r}: there is no rank {fault.rank}", last))
        if steps is not None and fault.step > steps:
            what = f"{text!r} comes after the run's last step, {steps:,}"
            found.append(("faults", what, "choose an earlier step"))
    return found
