"""The limits of a cluster, which a submission must keep to: SLURM also takes a job that is too long
for its partition, and lets it wait for ever.

Invariant: a problem is what no later hour can change: nodes that are down now are none. If the
controller doesn't answer, or the job's partition or QOS isn't known here, nothing is a problem
here: sbatch asks again.
"""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

from forescale.config.duration import Duration
from forescale.config.schema import Problem
from forescale.ground.errors import UserError
from forescale.slurm import queue
from forescale.slurm.config import SlurmConfig

Fields = Mapping[str, str]  # of a partition or a QOS, by SLURM's names
# What replaces, in sbatch, the keys that are compared with limits.
_OPTION = re.compile(r"-[pqMtN]|--(partition|qos|clusters?|time|nodes)\b")
_VARIABLES = {f"SBATCH_{name}" for name in ("PARTITION", "QOS", "CLUSTERS", "TIMELIMIT")}


def limit_problems(settings: SlurmConfig) -> list[Problem]:
    """Return where the settings, with slurm.nodes.most nodes, go beyond the limits of the cluster;
    none without SLURM."""
    if any(map(_OPTION.match, settings.options)) or _VARIABLES & os.environ.keys():
        return []
    with suppress(UserError, ValueError):  # ValueError: a number in a form that isn't known
        if queue.is_here() and (settings.partition or not queue.has_submit_plugin()):
            partitions = queue.partitions()
            has_qos = settings.qos or any(p.get("QoS", "N/A") != "N/A" for p in partitions)
            return beyond(settings, partitions, queue.limits_of_qos() if has_qos else {})
    return []


def beyond(
    s: SlurmConfig, partitions: Sequence[Fields], qos: Mapping[str, Fields]
) -> list[Problem]:
    """Return where the settings go beyond the limits of partitions and QOS, by name. A job runs in
    any of several partitions: one that allows it is enough."""
    by_name = {p["PartitionName"]: p for p in partitions}
    default = ",".join(name for name, p in by_name.items() if p.get("Default") == "YES")
    names = [name for name in (s.partition or default).split(",") if name]
    if unknown := [name for name in names if name not in by_name and by_name]:
        problem = f"the cluster has no partition {unknown[0]}"
        return [Problem("slurm.partition", problem, f"choose of: {', '.join(sorted(by_name))}")]
    each = [_beyond(s, by_name[name], qos) for name in names if name in by_name]
    return each[0] if all(each) and each else []


def _beyond(s: SlurmConfig, partition: Fields, qos: Mapping[str, Fields]) -> list[Problem]:
    where = f"partition {partition['PartitionName']}"
    of_job, of_partition = qos.get(s.qos or "", {}), qos.get(partition.get("QoS", ""), {})
    flags = of_job.get("Flags", "").split(",")
    if s.qos and not of_job:  # its flags may lift the limits
        return []
    first, second = (of_job, of_partition) if "OverPartQOS" in flags else (of_partition, of_job)
    limits = {**second, **{key: value for key, value in first.items() if value}}
    tres = dict(part.partition("=")[::2] for part in limits.get("MaxTRES", "").split(","))
    longest = "" if "PartitionTimeLimit" in flags else partition.get("MaxTime", "")
    most_nodes = "" if "PartitionMaxNodes" in flags else partition.get("MaxNodes", "")
    time, nodes = s.time and s.time.seconds, s.nodes.most + s.spares
    problems = []
    for key, size, text, whose, unit in (
        ("time", time, longest, where, ""),
        ("time", time, limits.get("MaxWall", ""), "its QOS", ""),
        ("nodes", nodes, most_nodes, where, " nodes"),
        ("nodes", nodes, partition.get("TotalNodes", ""), where, " nodes"),
        ("nodes", nodes, tres.get("node", ""), "its QOS", " nodes"),
        ("nodes", nodes * s.gpus, tres.get("gres/gpu", ""), "its QOS", " GPUs"),
    ):
        most = _number(text)
        if size and most is not None and size > most:
            value, todo = f"{size}{unit}", f"ask for {text}{unit} at most"
            if key == "time":
                value, todo = str(s.time), f"write slurm.time={text}: a run goes on in its next job"
            problems.append(Problem(f"slurm.{key}", f"{value} is beyond {whose}'s limit", todo))
    return list({problem.key: problem for problem in reversed(problems)}.values())


def _number(text: str) -> float | None:
    """Return a number, or a time in seconds, as SLURM prints it; None if it is unlimited."""
    if not text[:1].isdigit():
        return None
    return Duration.parse(text, wall_time=True).seconds if ":" in text else float(text)
