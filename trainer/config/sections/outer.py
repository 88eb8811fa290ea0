"""Config section `outer`: one run on several clusters, whose members exchange weights by files.

Invariant: what decides which step an exchange comes after is in this file alone, a pure function of
the config and the step, so that all members exchange after the same steps.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forescale.config.duration import Duration
from forescale.config.job import ProblemIterator
from forescale.config.schema import key

if TYPE_CHECKING:
    from forescale.config.train import TrainJob

_STORE = r"/|~/|(?!https?:|file:|local:|memory:)[a-z][\w+.-]*://[^?#]+$"
# Not those of other files in the store (checkpoint/outer.py).
_NAME = r"(?i:(?!decision$)[a-z0-9_-]+)(?<!-joins)(?<!-needs)"


@dataclass
class OuterConfig:
    # steps from one exchange of weights with the other clusters to the next; null: the run is on
    # one cluster
    every: Duration | None = key(None, gt=0, wall_time=False)
    # folder or bucket that all members reach, such as s3://bucket/run: there they exchange weights
    store: str | None = key(None, kind="free")
    member: str | None = None  # the name of this cluster in the run
    members: list[str] = key([])  # the names of all of them, such as [north, south]
    # of the outer step: SGD with Nesterov's momentum, whose gradient is by how much the weights
    # have moved since the last exchange, the mean over members
    learning_rate: float = key(0.7, gt=0)
    momentum: float = key(0.9, ge=0, lt=1)  # of the outer step
    # how long to wait for members that are late; then the outer step is made without them
    wait: Duration = key(Duration(1800, "seconds"), kind="free", gt=0, wall_time=True)
    # parts of the blocks that are exchanged at different steps, each every `every` steps; 1: all
    # at once
    fragments: int = key(1, ge=1)
    # steps that training goes on while an exchange is under way, before its result is applied; 0:
    # training waits for it
    overlap: Duration = key(Duration(0), wall_time=False)
    # share of its own weights that a member keeps where a result is applied after such steps
    mixing: float = key(0.5, ge=0, lt=1)
    # bytes a second between a cluster and outer.store, for `plan`
    link: float = key(125e6, kind="free", gt=0)

    @property
    def steps(self) -> int | None:
        """The steps from one exchange of a fragment to its next; None on one cluster."""
        return None if self.every is None else int(self.every.amount)

    @property
    def count(self) -> int:
        """The number of members."""
        return len(self.members) if self.every else 1

    @property
    def index(self) -> int:
        """The number of this member among all, in the order of their names."""
        return sorted(self.members).index(self.member) if self.every and self.member else 0

    @property
    def delay(self) -> int:
        """The steps from an exchange to the outer step of its result."""
        return int(self.overlap.amount)

    def applied(self, step: int, total: int) -> int:
        """Return the step after which the outer step of a round is made."""
        return step if step == total else step + self.delay

    def due(self, step: int, total: int) -> tuple[int, ...]:
        """Return the fragments that are exchanged after a step: at the last of `total` steps all of
        them, so that the members end with the same weights. An exchange whose result would come
        only then is left out."""
        every, count = self.steps, self.fragments
        if step == total and every:
            return tuple(range(count))
        if every is None or not 0 < step < total - self.delay:
            return ()
        return tuple(i for i in range(count) if step % every == (i + 1) * every // count % every)

    def problems(self) -> ProblemIterator:
        if self.every is None:
            if self.store or self.member or self.members:
                problem = "is not given, and says how often the members exchange their weights"
                yield "every", problem, "write, for example, outer.every='500 steps'"
            return
        if self.every.unit != "steps":
            problem = f"{self.every} is no number of steps, of which all members make as many"
            yield "every", problem, "write, for example, outer.every='500 steps'"
        elif self.fragments > self.every.amount:
            problem = f"{self.fragments} fragments have no steps of their own in {self.every}"
            yield "fragments", problem, "give fewer, or a longer outer.every"
        elif self.overlap.unit != "steps" or self.delay >= self.every.amount // self.fragments:
            parts = f" in {self.fragments} fragments" if self.fragments > 1 else ""
            problem = f"{self.overlap} is no number of steps below those between two exchanges, "
            problem += f"of one every {self.every}{parts}"
            yield "overlap", problem, "give fewer steps, or a longer outer.every"
        if self.store is None:
            problem = "is not given, and is where the members exchange their weights"
            yield "store", problem, "write, for example, outer.store=s3://bucket/run"
        elif not re.match(_STORE, self.store):
            problem = f"{self.store} is neither a bucket's address nor an absolute path"
            yield "store", problem, "write, for example, s3://bucket/run or /shared/run"
        names = self.members
        if len(names) < 2 or len({name.lower() for name in names}) < len(names):
            problem = f"{names} are not the names of two members or more"
            yield "members", problem, "write, for example, outer.members=[north,south]"
        if wrong := [name for name in names if not re.fullmatch(_NAME, name)]:
            todo = "use letters, digits, - and _, and none of decision, ...-joins and ...-needs"
            yield "members", f"{wrong[0]!r} can't be the name of a member's files", todo
        if self.member not in names:
            problem = f"{self.member or 'null'} is not one of outer.members, {', '.join(names)}"
            yield "member", problem, "give the name of this cluster there"


def outer_problems(job: "TrainJob") -> ProblemIterator:
    """Yield what a run on several clusters can't be combined with."""
    if job.outer.every is None:
        return
    layers = getattr(job.model, "num_layers", None)
    if layers is not None and job.outer.fragments > layers:
        problem = f"{job.outer.fragments} fragments have no block each of {layers}"
        yield "outer.fragments", problem, "give fewer"
    if getattr(getattr(job.model, "mlp", None), "bias_speed", 0):
        problem = "moves biases of experts by the tokens of one member alone"
        yield "model.mlp.bias_speed", problem, "leave it out, or outer.every"
    if job.objective.are_preferences:
        problem = "the reference of preferences has not been tried with several members"
        yield "outer.every", problem, "leave it out"
