"""One run on two clusters, each an ordinary command: beside a plain loop of two replicas, with
kills at every point of a round, on other numbers of ranks, and with a member that was absent."""

import math
import signal

import pytest
import torch

from forescale.checkpoint.reader import Checkpoint
from forescale.monitor.audit import check_run
from forescale.run.directory import Run
from tests import launching

pytestmark = pytest.mark.distributed

LENGTH = ("train.tokens=null", "train.steps=11", "validation.every=11", "checkpoint.every=2")
OUTER = ("outer.every='3 steps'", "outer.members=[south,north]", "outer.wait='4 min'")


def words(folder, dataset, member, *others):
    names = (f"run.name={member}", f"outer.member={member}", f"outer.store={folder}/store")
    return (f"data.path={dataset}", *LENGTH, *OUTER, *names, "launch.processes=1", *others)


def together(folder, dataset, north=(), south=(), both=(), **environment):
    """Train both members to the end, at the same time; return their outputs."""
    folder.mkdir(exist_ok=True)
    started = [
        launching.start(folder, *words(folder, dataset, member, *both, *others), **environment)
        for member, others in (("north", north), ("south", south))
    ]
    outputs = [process.communicate(timeout=400)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def weights(run, step=11):
    checkpoint = Checkpoint(run / f"checkpoints/step-{step:08d}")
    return {name: checkpoint.tensor(name) for name in checkpoint.shapes}


def expect_equal(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def replicas(words, delay):
    """The weights after a plain loop over two replicas: AdamW each, then Nesterov's SGD, `delay`
    steps later on half of each replica's weights."""
    from forescale.config.compose import compose
    from forescale.config.train import TrainJob
    from forescale.data.stream import StepShare, stream
    from forescale.engine.optim import build_optimizer, parameter_groups
    from forescale.run.feed import feed_of
    from forescale.run.start import open_sources, settle
    from forescale.train.model import build_model

    models, optimizers, batches = [], [], []
    for member in ("north", "south"):
        typed = compose(TrainJob, [*words, f"outer.member={member}"])
        sources = open_sources(typed.data)
        job = settle(typed, sources)
        share = StepShare(job.train.global_batch, job.train.micro_batch)
        batches.append(stream(feed_of(job, sources), share, range(job.total_steps), 0))
        models.append(build_model(job, sources.vocab_size))
        groups = parameter_groups(models[-1].named_parameters(), job.optimizer, None, None)
        optimizers.append(build_optimizer(job.optimizer, [g.as_dict() for g in groups]))
    outer = [p.detach().clone() for p in models[0].parameters()]
    momentum = [torch.zeros_like(p) for p in outer]
    gradients: dict[int, list] = {}  # by the step after which they are applied
    for step in range(job.total_steps):
        rate = job.schedule.rate(step, job.total_steps, job.warmup_steps, job.decay_steps)
        for model, optimizer, stream_ in zip(models, optimizers, batches, strict=True):
            batch = next(stream_)
            for micro in batch.micro:
                losses = model(micro.tokens, micro.targets)
                losses = losses[0] if isinstance(losses, tuple) else losses
                (losses.sum() / batch.targets).backward()
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak_learning_rate"]
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            weights = [*zip(outer, *(x.parameters() for x in models), strict=True)]
            at, end = step + 1, job.total_steps
            if at == end or (at % 3 == 0 and at + delay < end):
                now = [((w - one) + (w - two)) / 2 for w, one, two in weights]
                gradients[at if at == end else at + delay] = now
            share = 0.5 if delay and at < end else 0.0
            now = gradients.pop(at, ())
            for gradient, m, (w, *both) in zip(now, momentum, weights, strict=bool(now)):
                m.copy_(0.9 * m + gradient)
                w -= 0.7 * (0.9 * m + gradient)
                for p in both:
                    p.copy_((1 - share) * w + share * p)
    return dict(zip([n for n, _ in models[0].named_parameters()], outer, strict=True))


PLAIN = ("precision=fp32", "optimizer=adamw", "optimizer.clip=null", "train.global_batch=2")


@pytest.mark.parametrize("delay", [0, 2])
def test_two_members_are_two_replicas_of_a_plain_loop_to_the_bit(dataset, tmp_path, delay):
    together(tmp_path, dataset, both=(*PLAIN, f"outer.overlap={delay}"))
    expect_equal(weights(tmp_path / "north"), weights(tmp_path / "south"))
    every = [f"run.root={tmp_path}", *launching.SHORT, *launching.TINY]
    every += words(tmp_path, dataset, "north", *PLAIN)
    expect_equal(weights(tmp_path / "north"), replicas(every, delay))
    hashes = [
        {row["tokens_hash"] for row in launching.rows(tmp_path / m)} for m in ("north", "south")
    ]
    assert not hashes[0] & hashes[1]


AT_ONCE = "3:rank0:send", "6:rank0:agree", "9:rank0:receive", "9:rank0:merge", "11:rank0:agree"
# Of rounds after steps 3 and 6, applied after 5 and 8; saved are the even steps.
UNDER_WAY = "3:rank0:send", "5:rank0", "7:rank0", "8:rank0:merge", "9:rank0"


@pytest.mark.parametrize(
    ("kills", "words"),
    [
        (AT_ONCE, ()),
        (UNDER_WAY, ("outer.every=6", "outer.overlap=2")),
    ],
)
def test_a_member_that_is_killed_anywhere_in_a_round_ends_with_the_same_bits(
    dataset, tmp_path, kills, words
):
    # Saved before the next step: a slow machine is not to count three crashes without a checkpoint.
    both = ("outer.fragments=2", "checkpoint.background=false", *words)
    together(tmp_path / "whole", dataset, both=both)
    faults = f"faults=[{','.join(f'kill@{kill}' for kill in kills)}]"
    north, _ = together(tmp_path / "cut", dataset, north=(faults,), both=both)
    for member in ("north", "south"):
        runs = [tmp_path / folder / member for folder in ("whole", "cut")]
        assert launching.trajectory(runs[0]) == launching.trajectory(runs[1])
        expect_equal(*map(weights, runs))
    assert launching.events(tmp_path / "cut/north").count("fault_injected") == len(kills), north


def test_members_of_other_stages_and_numbers_of_ranks_make_the_same_bits(dataset, tmp_path):
    both = ("train.invariant=true", "optimizer=muon", "precision=bf16")
    together(tmp_path / "one", dataset, both=both)
    north, south = ("engine=zero3", "launch.processes=2"), ("engine=zero2",)
    together(tmp_path / "two", dataset, north, south, both)
    for member in ("north", "south"):
        runs = [tmp_path / folder / member for folder in ("one", "two")]
        assert launching.trajectory(runs[0]) == launching.trajectory(runs[1])
        expect_equal(*map(weights, runs))


RUIN = """
class Ruin:
    # Of a step before the first exchange: masters and moments become NaN.
    def __init__(self, engine):
        self.layout = engine.layout

    def see(self, step, summary):
        for unit in self.layout.units() if step.position.step == 2 else ():
            moments = self.layout.base.state[unit.master].values()
            for tensor in (unit.master, *(state for state in moments if state.dim())):
                tensor.detach().fill_(float("nan"))
"""


def test_a_member_whose_weights_become_nan_is_refused_and_takes_those_of_the_others(
    dataset, tmp_path
):
    (tmp_path / "ruin.py").write_text(RUIN)
    both = ("outer.fragments=2", "outer.every=6", "optimizer=adamw")
    north = ("callbacks=[{_target_: ruin.Ruin}]",)
    together(tmp_path, dataset, north, both=both, PYTHONPATH=str(tmp_path))
    for member in ("north", "south"):
        assert launching.events(tmp_path / member).count("outer_refused") == 1
        assert all(math.isfinite(row["loss"]) for row in launching.rows(tmp_path / member))
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "north").values())
    expect_equal(weights(tmp_path / "north"), weights(tmp_path / "south"))


def test_members_that_exchange_other_fragments_are_told_of_their_lengths(dataset, tmp_path):
    (tmp_path / "south").mkdir()
    both = ("outer.fragments=2", "outer.every=6")
    started = [
        launching.start(tmp_path, *words(tmp_path, dataset, member, *both, f"train.steps={steps}"))
        for member, steps in (("north", 9), ("south", 11))
    ]
    for process in started:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 2, output
        assert "exchange other fragments" in output


def test_an_absent_member_is_left_out_and_comes_back_to_the_newest_weights(dataset, tmp_path):
    alone = words(tmp_path, dataset, "north", "outer.wait='1 s'")
    process = launching.start(tmp_path, *alone)
    launching.interrupt(process, tmp_path / "north", 7, signal.SIGTERM)
    process = launching.start(tmp_path, *words(tmp_path, dataset, "south"))
    launching.wait_until(
        process, lambda: (tmp_path / "store/step-00000009/south.json").exists(), "its deltas"
    )
    launching.train(tmp_path, *words(tmp_path, dataset, "north"))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert [row["step"] for row in launching.rows(tmp_path / "south")] == [7, 8, 9, 10, 11]
    assert launching.events(tmp_path / "south").count("rejoined") == 1
    expect_equal(weights(tmp_path / "north"), weights(tmp_path / "south"))
    for member in ("north", "south"):
        assert "outer_step" in launching.events(tmp_path / member)
        findings = check_run(Run(tmp_path / member))
        assert not findings.faults, findings.faults


@pytest.mark.parametrize("delay", [0, 2])
def test_a_stop_while_a_member_waits_is_resumed_where_it_waited(dataset, tmp_path, delay):
    both = (f"outer.overlap={delay}",)
    process = launching.start(tmp_path, *words(tmp_path, dataset, "north", *both))
    sent = tmp_path / "store/step-00000003/north.json"
    there = lambda: sent.exists() and len(launching.rows(tmp_path / "north")) == 3 + delay  # noqa: E731
    launching.wait_until(process, there, "its deltas")
    process.send_signal(signal.SIGTERM)
    where = f"step {3 + delay}; the state is saved"
    assert where in process.communicate(timeout=120)[0]
    together(tmp_path, dataset, both=both)
    expect_equal(weights(tmp_path / "north"), weights(tmp_path / "south"))


def test_a_member_that_others_left_behind_goes_on_after_their_last_round(dataset, tmp_path):
    late = launching.start(tmp_path, *words(tmp_path, dataset, "south"), cold=True)
    south = tmp_path / "south"
    launching.wait_until(late, lambda: launching.rows(south), "its first step")
    (rank,) = launching.ranks_of(late).values()
    rank.suspend()
    assert len(launching.rows(south)) < 3
    launching.train(tmp_path, *words(tmp_path, dataset, "north", "outer.wait='1 s'"))
    rank.resume()
    output, _ = late.communicate(timeout=240)
    assert late.returncode == 0, output
    assert "later rounds were made without this member" in output
    expect_equal(weights(tmp_path / "north"), weights(south))
    assert not check_run(Run(south)).faults
    assert "complete" in launching.train(tmp_path, *words(tmp_path, dataset, "south"))
    (tmp_path / "store/members/south.json").unlink()
    other = words(tmp_path, dataset, "south", "run.name=other", "train.init_seed=5")
    assert "were others than those here" in launching.train(tmp_path, *other, code=2)
