"""An engine without DeepSpeed, and worlds without processes: the real code of checkpoints on them.

The state is a number: every element of every weight and moment is a function of `step`, so a test
sees at once which step a checkpoint holds, and whether all of it is of that step.
"""

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from forescale.checkpoint.choice import newest_complete
from forescale.checkpoint.reader import Position
from forescale.checkpoint.retention import Keep
from forescale.checkpoint.saver import Saver
from forescale.checkpoint.writer import Snapshot, write
from forescale.config.mesh import Mesh
from forescale.engine.ranks import ALONE, Ranks
from forescale.engine.stages import Bare
from forescale.run.directory import Parent, Run

STATES = {"weight": 0.0, "exp_avg": 0.25, "exp_avg_sq": 0.5}  # what is added to the step


class Exchange:
    """All-gather between threads."""

    def __init__(self, size: int):
        self._slots, self._gate = [None] * size, threading.Barrier(size)

    def gather(self, rank: int, value):
        self._slots[rank] = json.loads(json.dumps(value))  # as between processes
        self._gate.wait(60)
        values = list(self._slots)
        self._gate.wait(60)
        return values


class World(Ranks):
    """One thread among others, as forescale.engine.world.World."""

    device = torch.device("cpu")

    def __init__(self, rank: int = 0, size: int = 1, exchanges: list | None = None):
        super().__init__(rank, size)
        self.data = self.states = self.shard = self
        self.sequence = self.tensor = self.pipeline = self.replicas = ALONE
        self.mesh = Mesh(size)
        self._exchanges = exchanges
        self._groups = 0

    def gather(self, value):
        return [value] if self.size == 1 else self._exchanges[0].gather(self.rank, value)

    def gather_to_main(self, value):
        values = self.gather(value)
        return values if self.is_main else None

    def broadcast(self, value):
        return self.gather(value)[0]

    def in_background(self, name):
        """Return ranks with an exchange of their own."""
        self._groups += 1
        exchanges = self._exchanges and [self._exchanges[self._groups]]
        return World(self.rank, self.size, exchanges)


def worlds(size: int) -> list[World]:
    exchanges = [Exchange(size) for _ in range(8)]
    return [World(rank, size, exchanges) for rank in range(size)]


def on_all(parts, work):
    """Call work(part) in a thread each; return what it returned or raised, in order."""
    results = [None] * len(parts)

    def run(i, part):
        try:
            results[i] = work(part)
        except Exception as e:
            results[i] = e

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(parts)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
        assert not t.is_alive(), "a rank waits forever"
    return results


def engine(world: World | None = None, width: int = 8) -> SimpleNamespace:
    """A linear layer, a norm and a buffer under AdamW, with the attributes that checkpoints use."""
    module = nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width))
    module.register_buffer("offset", torch.zeros(3))
    optimizer = torch.optim.AdamW([{"params": list(module.parameters()), "name": "all"}])
    new = SimpleNamespace(
        world=world or World(),
        module=module,
        names={p: n for n, p in module.named_parameters()},
        layout=Bare(SimpleNamespace(optimizer=optimizer, basic_optimizer=optimizer)),
        grid=None,
        shapes={n: tuple(p.shape) for n, p in module.named_parameters()},
        buffer_shapes={"offset": (3,)},
        weights_changed=lambda: None,
        outer=None,
    )
    set_step(new, 0)
    return new


@torch.no_grad()
def set_step(engine, step: int) -> None:
    """Set the engine's state to that of `step`, in place as training does."""
    engine.module.offset.fill_(step)
    for p in engine.module.parameters():
        p.fill_(step + STATES["weight"])
        state = engine.layout.base.state[p]
        for name in ("exp_avg", "exp_avg_sq"):
            state.setdefault(name, torch.zeros_like(p)).fill_(step + STATES[name])
        state["step"] = torch.tensor(float(step))


def position(step: int) -> Position:
    return Position(step, 4 * step, 128 * step)


def step_in(checkpoint) -> int:
    """The step that a checkpoint's every element says; fails if it isn't of one piece."""
    step = checkpoint.position.step
    assert checkpoint.position == position(step)
    assert checkpoint.state["counters"]["optimizer_steps"] == {"all": step}
    for name in checkpoint.shapes:
        for state in checkpoint.reader.states(name):
            values = set(checkpoint.tensor(name, state).flatten().tolist())
            assert values == {step + STATES[state]}, (name, state, values)
    return step


def begin(run: Run, step: int = 0):
    """Return a new attempt that starts from `step`."""
    attempt = run.new_attempt()
    attempt.start_from(Parent(step), run)
    return attempt


class Gate:
    """Used as `midway`: the writer waits half-way until the gate is opened."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, step, path):
        self.reached.set()
        assert self.opened.wait(60)


def saver(run, attempt, engine, **options):
    return Saver(run, attempt, engine, options.pop("facts", dict), Keep(2), **options)


def write_checkpoint(run, attempt, position, engine):
    """Write and publish a checkpoint at once; every rank calls it. Returns its path."""
    snapshot = Snapshot.of(engine, position, {})
    write(run, attempt, snapshot, engine.world)
    return run.checkpoint_path(position.step)


def save(saver, engine, step):
    set_step(engine, step)
    saver.begin(position(step))


def newest(run):
    """Return the step of the newest checkpoint, after checking it; 0 if there is none."""
    checkpoint = newest_complete(run, lambda kind, **facts: pytest.fail(f"{kind} {facts}"))
    return step_in(checkpoint) if checkpoint else 0


def hidden(run):
    return [p.name for p in run.checkpoints.glob(".*")] if run.checkpoints.exists() else []


def events(run, kind):
    return run.read_events(kind=kind)


def harm(run, step):
    """Flip a bit of a saved tensor."""
    path = run.checkpoint_path(step) / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
