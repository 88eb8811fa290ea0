"""What is asked of SLURM, and with which words; its commands are stand-ins that write down what
they were given (the lab of tests/cluster has the real ones)."""

import json
import os
import socket
from pathlib import Path

import pytest

from forescale.ground.errors import UserError
from forescale.ground.storage import write_json
from forescale.run.directory import Run
from forescale.slurm import queue
from forescale.slurm.submission import Submission, in_queue, newest


def test_a_task_of_an_array_has_an_id_of_its_own(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "40")
    assert queue.own_job() == "40"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert queue.own_job() == "40_2"


def test_a_job_without_a_step_is_never_killed_as_a_whole(commands):
    commands(squeue="echo 40_2.batch; echo 40_2.extern")
    assert queue.newest_step("40_2", besides="standby") is None
    commands(squeue="echo 40_2.batch batch; echo 40_2.0 a b; echo 40_2.11 bash; echo 40_2.3 bash")
    assert queue.newest_step("40_2", besides="standby") == "40_2.11"


def test_the_step_that_only_stands_by_is_not_the_one_to_kill(commands):
    commands(squeue="echo 7.batch batch; echo 7.1 bash; echo 7.2 standby")
    assert queue.newest_step("7", besides="standby") == "7.1"


def test_a_node_is_lost_when_slurm_took_it_from_the_job_even_if_it_came_back(commands):
    output = 'show) echo "JobId=7 ReqNodeList=(null) NodeList=$left BatchHost=n1" ;;'
    commands(
        scontrol=f'left="n[1,3-4]"\ncase "$1$2" in --oneliner{output} *) printf "n1 n3 n4" ;; esac',
        sinfo="echo 'n1 mixed'; echo 'n2 idle'; echo 'n3 mixed*'; echo 'n4 mixed'",
    )
    assert queue.lost("7", ["n1", "n2", "n3", "n4"]) == ["n2", "n3"]


def test_nodes_that_nothing_answers_from_are_given_up(commands, tmp_path, monkeypatch):
    nodes = (
        "NodeName=n1 Arch=x86_64 NodeAddr=a1 X=1\nNodeName=n2 NodeAddr=a2 \nNodeName=n3 NodeAddr=a3"
    )
    commands(
        scontrol=f'case "$*" in *config) echo "SlurmdPort              = 6818" ;; update*)'
        f" pwd > {tmp_path}/calls; echo $@ >> {tmp_path}/calls ;; *) printf '{nodes}' ;; esac"
    )

    def connect(address, timeout):
        assert address[1] == 6818
        raise {"a1": ConnectionRefusedError, "a2": TimeoutError, "a3": socket.gaierror}[address[0]]

    monkeypatch.setattr(socket, "create_connection", connect)
    assert queue.unreachable(["n1", "n2", "n3"]) == ["n2"], "the others answer, or have no address"
    queue.keep_nodes("7", ["n1", "n3"])
    place, call = (tmp_path / "calls").read_text().splitlines()
    assert call == "update JobId=7 NodeList=n1,n3"
    assert place != os.getcwd()
    assert not Path(place).exists(), "with the scripts that scontrol writes for users"


def test_the_cpus_of_the_smallest_node_of_a_partition(commands):
    commands(
        sinfo='case "$*" in *=gpu*) echo "gpu 96"; echo "gpu 64+" ;;'
        ' *) echo "gpu 64"; echo "cpu* 128" ;; esac'
    )
    assert queue.cpus_of_nodes("gpu") == 64
    assert queue.cpus_of_nodes(None) == 128
    commands(sinfo="echo")
    assert queue.cpus_of_nodes("gpu") is None


def test_a_job_submitted_within_another_takes_over_nothing_of_it(commands, tmp_path, monkeypatch):
    of_the_other = ["SLURM_JOB_ID", "SLURM_NNODES", "SLURM_MEM_PER_CPU", "SLURMD_NODENAME", "RANK"]
    of_the_other += ["LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "PMI_RANK", "FORESCALE_ATTEMPT"]
    of_the_other.append("SBATCH_EXPORT")  # a site's default, instead of the script's
    names = ["SLURM_CONF", "SBATCH_ACCOUNT", "HOME", "FORESCALE_CONF"]
    for name in (*of_the_other, *names):
        monkeypatch.setenv(name, "x")
    commands(sbatch=f"env > {tmp_path}/seen; echo '17;lab'")
    assert queue.submit(tmp_path / "job.sbatch") == "17"
    variables = {line.partition("=")[0] for line in (tmp_path / "seen").read_text().splitlines()}
    assert variables.isdisjoint(of_the_other)
    assert variables.issuperset(names)


def test_a_requeued_job_waits_where_it_is_told_to(commands, tmp_path):
    commands(scontrol=f'echo "$@" >> {tmp_path}/calls')
    queue.requeue("40_2")
    queue.requeue("40_2", ["n1", "n2"], 60)
    assert (tmp_path / "calls").read_text().splitlines() == [
        *("requeue 40_2", "requeue 40_2"),
        "update JobId=40_2 ExcNodeList=n1,n2 StartTime=now+60",
    ]


@pytest.fixture
def submission(tmp_path):
    job = Submission(Run(tmp_path / "runs/x").new_job())
    job.submitted("12", job.script, "lab", 1764172905.0)
    return job


@pytest.mark.parametrize(
    ("time", "script", "is_its"),
    [
        (1764172905, None, True),
        (1764233999, None, True),  # when it was requeued
        (1764172904, None, False),
        (1764233999, "/home/other/job.sbatch", False),
    ],
)
def test_an_id_that_began_anew_is_another_job(commands, submission, time, script, is_its):
    line = f"12|RUNNING|None|1:00|2:00|n1|N/A|{time}|{script or submission.script}"
    commands(sbatch="", squeue=f"echo '{line}'")
    assert [s for s, _ in in_queue([submission])] == [submission] * is_its


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/Los_Angeles"])
def test_a_job_is_the_same_in_every_time_zone(commands, submission, zone, monkeypatch):
    """squeue prints times of the reader's zone, unless it is to print seconds."""
    monkeypatch.setenv("TZ", zone)
    time = 'date -d @1764172905 "+${SLURM_TIME_FORMAT#standard}"'
    line = f'"12|PENDING|None|0:00|1:00||N/A|$({time})|{submission.script}"'
    commands(sbatch="", squeue=f"echo {line}")
    ((_, job),) = in_queue([submission])
    assert (job.submitted, job.start) == (1764172905.0, 0.0)


def test_a_job_that_an_older_version_submitted_is_still_its_own(commands, submission):
    """It wrote a local time, which can't be compared."""
    facts = {**submission.accepted, "accepted": "2026-11-26T16:01:45"}
    write_json(submission.path / "job.json", facts)
    commands(sbatch="", squeue=f"echo '12|RUNNING|None|1:00|2:00|n1|N/A|17|{submission.script}'")
    assert [s for s, _ in in_queue([submission])] == [submission]


def test_a_submission_that_never_got_a_job_hides_none(submission):
    submission.run.new_job()
    assert newest(submission.run) == [submission]


def test_what_slurm_says_is_the_message(commands):
    commands(scancel="echo 'scancel: error: Kill job error on job id 7: Access denied' >&2; exit 1")
    with pytest.raises(UserError, match="SLURM says: Kill job error on job id 7: Access denied"):
        queue.cancel("7")


def test_the_name_of_the_cluster_is_kept(commands, submission):
    commands(scontrol="echo 'AccountingStorageHost = x'; echo 'ClusterName             = lab2'")
    assert queue.cluster() == "lab2"
    assert json.loads((submission.path / "job.json").read_text())["cluster"] == "lab"
