"""Faults to inject into a run, written KIND@STEP[:rankN][:PLACE].

Invariant: `read(str(fault)) == fault`, and a wrong text is refused with one sentence. The faults
are injected in resilience/injector.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from forescale.config.job import Problems
from forescale.config.suggest import nearest_first
from forescale.ground.errors import UserError

KINDS = {
    "kill": "the rank gets SIGKILL",
    "freeze": "the rank gets SIGSTOP: it stops without an end",
    "hang": "the training thread sleeps forever; other threads run on",
    "exit": "the training thread raises an exception",
    "slow": "the rank sleeps 0.1 s in each of 20 steps",
    "nan": "the step's gradient is NaN on this rank",
    "spike": "the step's gradient is 1000 times too large on this rank",
    "flip": "one bit of one weight flips in this rank's memory",
    "corrupt": "one bit of the newest published checkpoint flips",
    "enospc": "this rank's next write of a checkpoint fails with a full disk",
}
_PLACED = ("kill", "freeze", "hang", "exit", "slow")
ROUND = ("send", "agree", "receive", "merge")
PLACES = (
    *("data", "forward", "backward", "norm", "update"),  # within a step, in this order
    *("summary", "evaluation", "checkpoint"),  # after a step
    *ROUND,  # within a round with other clusters
    "write",  # while a file of a checkpoint is written, in any thread
)
_FORM = re.compile(r"([\w-]+)@(\d+)((?::[\w-]+)*)")


@dataclass(frozen=True)
class Fault:
    """A fault of `rank` at `place` of `step` (the first step is 1).

    At place "write", and for corrupt and enospc: at the first opportunity from this step on.
    """

    kind: str
    step: int
    rank: int = 0
    place: str = "forward"

    def __str__(self) -> str:
        place = "" if self.place == "forward" else f":{self.place}"
        return f"{self.kind}@{self.step}:rank{self.rank}{place}"


def read(text: str) -> Fault:
    """Return the fault that a text describes. Raises UserError if it is wrong."""
    match = _FORM.fullmatch(text.strip())
    kind = match[1] if match else re.split(r"\W", text.strip())[0]
    near = nearest_first(kind, KINDS)[0]
    if not match:
        problem = f"{text!r} is not KIND@STEP[:rankN][:PLACE]"
        raise UserError("faults", problem, f"write, for example, {near}@120:rank1")
    if kind not in KINDS:
        others = ", ".join(sorted(KINDS.keys() - {near}))
        todo = f"the nearest is {near}; the others are {others}"
        raise UserError("faults", f"{text!r} is not a known kind of fault", todo)
    if (step := int(match[2])) < 1:
        raise UserError("faults", f"{text!r} never happens", "the first step is 1")
    slots: dict[str, str] = {}
    for word in match[3].split(":")[1:]:
        slot = "rank" if re.fullmatch(r"rank\d+", word) else "place"
        if slot in slots:
            raise UserError("faults", f"{text!r} names two {slot}s", f"leave out :{word}")
        slots[slot] = word
    place = slots.get("place", "forward")
    if place not in PLACES:
        near = nearest_first(place, (*PLACES, "rank1"))[0]
        todo = f"the nearest is {near}; places are {', '.join(PLACES)}"
        raise UserError("faults", f"{text!r}: there is no place {place}", todo)
    if "place" in slots and kind not in _PLACED:
        raise UserError("faults", f"{text!r}: {kind} takes no place", f"leave out :{place}")
    return Fault(kind, step, int(slots.get("rank", "rank0").removeprefix("rank")), place)


def problems(faults: Sequence[str], ranks: int | None = None, steps: int | None = None) -> Problems:
    """Return the problems of a run's list of faults. ranks, steps: of the run, if known."""
    result: Problems = []
    earlier: set[Fault] = set()
    for text in faults:
        try:
            fault = read(text)
        except UserError as e:
            result.append((e.where, e.problem, e.todo))
            continue
        if fault in earlier:
            problem = f"{text!r} is given twice, but a fault happens once per run"
            result.append(("faults", problem, "give another step or rank"))
        earlier.add(fault)
        if ranks is not None and fault.rank >= ranks:
            last = f"choose a rank from 0 to {ranks - 1}, or more ranks" if ranks > 1 else "take 0"
            result.append(("faults", f"{text!r}: there is no rank {fault.rank}", last))
        if steps is not None and fault.step > steps:
            problem = f"{text!r} comes after the run's last step, {steps:,}"
            result.append(("faults", problem, "choose an earlier step"))
    return result
