"""Whether more nodes are free, and worth a restart, from a run's files and SLURM's commands."""

import time

import pytest

from forescale.config.compose import compose
from forescale.config.frozen import freeze
from forescale.config.schema import plain
from forescale.config.sizes import Sizes
from forescale.config.train import TrainJob
from forescale.ground.errors import INTERRUPTED
from forescale.resilience import outcome
from forescale.run.directory import Parent, Run
from forescale.slurm.config import SlurmConfig
from forescale.slurm.growth import growth_of
from forescale.slurm.submission import Submission


@pytest.fixture
def job():
    batch = ["train.global_batch=8", "train.micro_batch=1"]
    return compose(TrainJob, ["run.name=run", "train.steps=1000", *batch])


@pytest.fixture
def cluster(commands, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")

    def put(idle, usable=None, starts_in=0.0, left=1e6):
        now = time.time()
        nodes = "; ".join(f"echo 'n{i} idle'" for i in range(5, 5 + idle))
        commands(
            sinfo=f"echo 'n1 mixed'; echo 'n2 planned'; echo 'n3 idle*'; {nodes or 'true'}",
            scontrol=f"echo JobId=7 EndTime={now + left:.0f}",
            sbatch=f"[ ${{3#--nodes=}} -le {idle if usable is None else usable} ] || exit 1; "
            f"echo 'sbatch: Job 8 to start at {now + starts_in:.0f} using 8' >&2",
        )

    return put


@pytest.fixture
def grown(tmp_path, job):
    """Returns the growth of a job that has trained on two nodes, and then for 100 steps on one."""
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text(freeze(job))
    submission = Submission(run.new_job())
    for nodes, seconds, end in ((2, 0.7, 100), (1, 1.0, 200)):
        attempt = run.new_attempt()
        start = {"submission": "0001", "nodes": [f"n{i}" for i in range(nodes)]}
        outcome.record_start(attempt.path, [], nodes, slurm=start | {"restart": 0})
        attempt.start_from(Parent(end - 100, None), run)
        for step in range(end - 99, end + 1):
            spent = {"compute": seconds, "startup": 9.0 * (step == end - 99)}
            row = {"kind": "train", "step": step, "attempt": attempt.number, "seconds": spent}
            attempt.metrics.add(row)
        if nodes == 2:
            outcome.record_end(attempt.path, INTERRUPTED, "")

    def growth(spares=0):
        settings = SlurmConfig(nodes=Sizes(1, 4), spares=spares)
        facts = {"restart": 50.0, "sizes": [4, 2, 1]}
        submission.write(slurm=plain(settings), **facts)
        return growth_of(run, submission, job, "7", 1, ["n1"])

    return growth


def test_more_nodes_that_are_free_and_worth_a_restart(cluster, grown):
    cluster(idle=3)
    growth = grown()
    assert (growth.nodes, growth.price) == (4, 50.0)
    assert growth.gain == pytest.approx(800 * 0.75), "two micro-batches in the time of eight"
    cluster(idle=1)
    assert grown().gain == pytest.approx(800 * 0.3), "as measured on two"


def test_fewer_where_slurm_would_not_start_it_on_all_that_are_idle(cluster, grown):
    cluster(idle=3, usable=1)
    assert grown().nodes == 2


def test_a_job_on_few_nodes_counts_no_spare_ones(cluster, grown):
    cluster(idle=3)
    assert grown(spares=1).nodes == 4


@pytest.mark.parametrize("facts", [{"idle": 0}, {"idle": 3, "starts_in": 600}, {"left": 60}])
def test_nodes_that_others_wait_for_and_too_little_time(cluster, grown, facts):
    cluster(**{"idle": 3, **facts})
    assert grown() is None
