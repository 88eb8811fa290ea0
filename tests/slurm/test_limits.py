"""What a cluster allows, by what SLURM prints; what it refuses to test is a sentence."""

from dataclasses import replace

import pytest

from forescale.config.duration import Duration
from forescale.config.sizes import Sizes
from forescale.ground.errors import UserError
from forescale.slurm import queue
from forescale.slurm.config import SlurmConfig
from forescale.slurm.limits import beyond, limit_problems

DAY = {"PartitionName": "day", "Default": "YES", "MaxTime": "1-00:00:00", "MaxNodes": "8"}
DAY |= {"TotalNodes": "64", "QoS": "N/A"}
LONG = {"PartitionName": "long", "MaxTime": "UNLIMITED", "MaxNodes": "UNLIMITED", "QoS": "part"}
LONG |= {"TotalNodes": "4"}
QOS = {
    "part": {"Flags": "", "MaxWall": "", "MaxTRES": "gres/gpu=16"},
    "short": {"Flags": "", "MaxWall": "08:00:00", "MaxTRES": "node=2"},
    "over": {"Flags": "PartitionMaxNodes,PartitionTimeLimit,OverPartQOS", "MaxTRES": "gres/gpu=64"},
}
PLUGIN = "JobSubmitPlugins        = lua"


@pytest.mark.parametrize(
    ("keys", "problems"),
    [
        ({}, []),
        ({"hours": 24, "nodes": 8}, []),
        (
            {"hours": 48},
            ["slurm.time: 48 h is beyond partition day's limit; write slurm.time=1-"],
        ),
        ({"hours": 48, "partition": "day,long"}, []),  # it runs in the one that allows it
        (
            {"hours": 48, "nodes": 9, "partition": "day,long"},
            ["slurm.nodes: 9 nodes", "slurm.time"],
        ),
        ({"nodes": 8, "spares": 1}, ["slurm.nodes: 9 nodes is beyond partition day's limit"]),
        ({"nodes": 5, "partition": "long"}, ["slurm.nodes: 5 nodes is beyond partition long's"]),
        ({"partition": "lang"}, ["slurm.partition: the cluster has no partition lang; choose of:"]),
        ({"hours": 9, "qos": "short"}, ["slurm.time: 9 h is beyond its QOS's limit; write"]),
        ({"nodes": 3, "qos": "short"}, ["slurm.nodes: 3 nodes is beyond its QOS's limit"]),
        ({"nodes": 3, "gpus_per_node": 8, "partition": "long"}, ["slurm.nodes: 24 GPUs is beyond"]),
        ({"nodes": 3, "gpus_per_node": 8, "partition": "long", "qos": "over"}, []),
        ({"hours": 48, "nodes": 9, "qos": "over"}, []),
        ({"hours": 48, "qos": "of another cluster"}, []),  # sbatch knows
    ],
)
def test_what_is_beyond_a_limit_of_the_cluster(keys, problems):
    hours = keys.pop("hours", None)
    time = hours and Duration(hours * 3600, "seconds")
    nodes = Sizes.parse(keys.pop("nodes", 1))
    lines = sorted(map(str, beyond(SlurmConfig(time=time, nodes=nodes, **keys), [DAY, LONG], QOS)))
    assert len(lines) == len(problems)
    for line, beginning in zip(lines, problems, strict=True):
        assert line.startswith(beginning)


def test_the_limits_are_read_from_slurm(commands, monkeypatch):
    partition = " ".join(f"{name}={value}" for name, value in DAY.items())
    config = "AccountingStorageEnforce = associations,limits,qos"
    commands(
        sbatch="",
        scontrol=f'case "$*" in *config) echo "{config}" ;; *) echo "{partition}" ;; esac',
        sacctmgr="echo 'normal|||'; echo 'short|DenyOnLimit|08:00:00|node=2,gres/gpu=16'",
    )
    settings = SlurmConfig(qos="short", nodes=Sizes(4, 4), time=Duration(48 * 3600, "seconds"))
    assert {p.key for p in limit_problems(settings)} == {"slurm.time", "slurm.nodes"}
    assert queue.limits_of_qos()["short"]["MaxTRES"] == "node=2,gres/gpu=16"
    too_long = SlurmConfig(time=settings.time)
    assert limit_problems(too_long)
    assert limit_problems(replace(too_long, options=["--partition=long"])) == []
    with monkeypatch.context() as patch:
        patch.setenv("SBATCH_PARTITION", "long")
        assert limit_problems(too_long) == []
    commands(scontrol=f'case "$*" in *config) echo "{PLUGIN}" ;; *) echo "{partition}" ;; esac')
    assert limit_problems(too_long) == [], "a plugin of the site may choose another partition"
    assert limit_problems(replace(too_long, partition="day"))
    commands(sacctmgr="exit 1", scontrol="exit 1")
    assert limit_problems(settings) == [], "sbatch asks again"


@pytest.mark.parametrize(
    ("says", "sentence"),
    [
        ("allocation failure: Invalid account or account/partition", "SLURM says: Invalid account"),
        ("sbatch: error: invalid partition: x\nallocation failure: Invalid partition name",
         "SLURM says: Invalid partition name"),
        ("sbatch: unrecognized option '--nix'", "SLURM says: .*unrecognized option"),
        ("allocation failure: Requested node configuration is not available", None),
        ("allocation failure: Invalid time value", None),  # of a reservation that begins later
        ("allocation failure: Required node not available (down, drained or reserved)", None),
        ("allocation failure: Unable to contact slurm controller (connect failure)", None),
    ],
)  # fmt: skip
def test_what_slurm_refuses_to_test_is_a_sentence_unless_nodes_may_come_back(
    commands, says, sentence
):
    commands(sbatch=f'[ "$1" = --test-only ] && cat > $0.script && echo "{says}" >&2; exit 1')
    if sentence is None:
        return queue.expect_accepted("#!/bin/bash\n")
    with pytest.raises(UserError, match=sentence):
        queue.expect_accepted("#!/bin/bash\n")


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("PartitionTimeLimit", "a shorter slurm.time"),
        ("QOSMaxWallDurationPerJobLimit", "a shorter slurm.time"),
        ("PartitionNodeLimit", "fewer nodes"),
        ("QOSMaxGRESPerJob", "fewer nodes, GPUs"),
        ("AssocGrpCPUMinutesLimit", "budget is used up"),
        ("QOSMaxJobsPerUserLimit", "when other jobs of yours have ended"),
        ("DependencyNeverSatisfied", "without slurm.after"),
        ("Dependency", "when the jobs that it waits for"),
        ("JobHeldUser", "scontrol release 7"),
        ("ReqNodeNotAvail, UnavailableNodes:n1", "sinfo -R"),
        ("Resources", "sooner with a shorter slurm.time"),
        ("None", ""),
    ],
)
def test_what_to_do_about_a_job_that_waits(reason, remedy):
    job = queue.Job.of(f"7|PENDING|{reason}|0:00|1:00||N/A|17|/job.sbatch")
    assert remedy in job.remedy
    assert bool(remedy) == bool(job.remedy)
