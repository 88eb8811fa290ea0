"""The files of a test cluster: slurm.conf, the client commands, keys and devices.

Invariant: everything lies under the cluster's root, so that clusters don't meet; and the waits of
SLURM that tests would otherwise sit through (120 s for a requeue, 300 s for a lost node) are set
to seconds.
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.cluster.namespaces import SYSTEM

LOGIN = "ctl"  # the name of the login node; the controller runs there too
NETWORK = "10.77.0"
LOGIN_ADDRESS = f"{NETWORK}.254"
CLIENTS = (
    "sbatch srun salloc squeue scontrol scancel sinfo sacct sacctmgr sstat sprio sdiag sbcast "
    "sattach strigger sreport sshare"
)

# From the host's network a client enters the login node's, under its name. In a node, or in the
# login node of another cluster, the environment there says which cluster is meant.
CLIENT = """\
#!/bin/sh
[ "$(readlink /proc/self/ns/net)" = "{own_network}" ] || exec {client} "$@"
pid=$(cat {root}/login.pid) || exit 1
export SLURM_CONF={root}/slurm.conf
exec nsenter -t "$pid" -n -u -- {client} "$@"
"""

# cred_expire is also how long a requeued job waits before it may run again: 120 s elsewhere. So
# here such a job can meet orders that were meant for its life before: to a lost node SLURM sends
# the end of a step again after 60 s, and where a node that was given up registers a step, it has
# the job's processes killed there (the job is then FAILED by signal 9, and not requeued).
CONF = """\
ClusterName=lab
SlurmctldHost={login}({login_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout={slurmd_timeout}
TCPTimeout=2
MessageTimeout=5
KillWait={kill_wait}
MinJobAge=7200
FirstJobId={first_job}
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
{settings}
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE \
GraceTime={grace_time} MaxTime=1-0 DefaultTime=10 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=1-0 DefaultTime=10 State=UP
"""


def address(node: str) -> str:
    return LOGIN_ADDRESS if node == LOGIN else f"{NETWORK}.{node[1:]}"


def write(root: Path, memory_of: Mapping[str, int], cpus: int, gpus: int, **values: object) -> None:
    """Everything anew but the logs: the state of an earlier start is lost."""
    for name in ("run", "state", "spool", "dev"):
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("", "run", "log", "state", "spool", "dev", "bin", "scratch"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name).chmod(0o755)  # munged refuses a folder that others can't enter
    key = os.open(root / "run" / "munge.key", os.O_CREAT | os.O_WRONLY, 0o600)
    with open(key, "wb") as f:
        f.write(os.urandom(128))
    lines = [f"{address(name)} {name}\n" for name in (LOGIN, *memory_of)]
    (root / "hosts").write_text("".join(["127.0.0.1 localhost\n", *lines]))
    shape = f"CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1"
    if gpus:
        shape += f" Gres=gpu:h100:{gpus}"
    nodes = [
        f"NodeName={node} NodeAddr={address(node)} {shape} RealMemory={memory} State=UNKNOWN"
        for node, memory in memory_of.items()
    ]
    values = {**values, "login": LOGIN, "login_address": LOGIN_ADDRESS, "nodes": "\n".join(nodes)}
    (root / "slurm.conf").write_text(CONF.format(root=root, **values))
    _write_gpus(root, list(memory_of), gpus)
    _write_clients(root)


def _write_gpus(root: Path, nodes: list[str], gpus: int) -> None:
    text = "AutoDetect=off\n"
    if gpus:
        files = f"{root}/dev/nvidia[0-{gpus - 1}]"
        text += f"NodeName={','.join(nodes)} Name=gpu Type=h100 File={files}\n"
    (root / "gres.conf").write_text(text)
    for i in range(gpus):  # null devices: for plain files jobs get no CUDA_VISIBLE_DEVICES
        os.mknod(root / "dev" / f"nvidia{i}", 0o020666, os.makedev(1, 3))


def _write_clients(root: Path) -> None:
    namespace = os.readlink("/proc/self/ns/net")
    for name in CLIENTS.split():
        client = shutil.which(name, path=SYSTEM)
        with suppress(FileNotFoundError):
            (root / "bin" / name).unlink()
        if client:
            text = CLIENT.format(root=root, own_network=namespace, client=client)
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)
