"""The checks of a node on itself: the run's storage, data, GPUs, memory, scratch and CPUs.

Invariant: checks are independent of each other; one that hangs or fails is a fault of its own. They
write only a small file, which they remove, and create the scratch directory.
"""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forescale.ground.errors import storage_error
from forescale.monitor.gpus import TorchGpus, try_gpus
from forescale.slurm.preflight.findings import NodeFault, Requirements

_GIB = 2**30
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_LITTLE, _FEW = _GIB, 10_000  # warn below these free bytes and inodes of the run's storage


@dataclass
class Here:
    """The node that is checked. mark: a file that the supervisor created in the run directory;
    facts: filled by the checks; importing: the check that still waits for torch; root, environment:
    replaced in tests."""

    host: str
    requirements: Requirements
    mark: str = ""
    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    facts: dict[str, Any] = field(default_factory=dict)
    importing: str = ""

    def fault(self, kind: str, problem: str, todo: str, note: bool = False) -> NodeFault:
        return NodeFault(self.host, problem, todo, kind, note)


def run_directory(here: Here) -> Iterator[NodeFault]:
    """Check that the run's directory is writable, is the supervisor's, and has free space."""
    run, todo = Path(here.requirements.run), "put run.root on a storage that all nodes share"
    if error := _unwritable(run, here.host):
        yield here.fault("run", f"{run} can't be written to: {error}", f"{todo}, and writable")
        return
    if here.mark and not (run / here.mark).exists():
        yield here.fault("run", f"{run} is not the directory that the first node sees", todo)
    room = os.statvfs(run)
    free = room.f_bavail * room.f_frsize
    here.facts |= {"run_free": free, "run_inodes": room.f_favail if room.f_files else None}
    if free < _LITTLE:
        problem = f"only {free / _GIB:.2f} GiB are free at {run}"
        yield here.fault("room", problem, "free some before checkpoints fail", note=True)
    if room.f_files and room.f_favail < _FEW:
        problem = f"only {room.f_favail:,} more files can be created at {run}"
        yield here.fault("inodes", problem, "remove some before checkpoints fail", note=True)


def _unwritable(directory: Path, host: str) -> str:
    """Return why no file can be created there, or ""."""
    path = directory / f".preflight-{host}-{os.getpid()}"
    try:
        path.write_bytes(bytes(4096))
        path.unlink()
    except OSError as e:
        with suppress(OSError):
            path.unlink()
        return _words(e)
    return ""


def _words(error: OSError) -> str:
    known = storage_error(error)
    return known.problem if known else (error.strerror or repr(error)).lower()


def datasets(here: Here) -> Iterator[NodeFault]:
    """Check that all files of every dataset exist with the right sizes."""
    for path in here.requirements.data:
        if "://" not in path and (problem := _dataset_fault(Path(path).expanduser())):
            todo = "make data.path readable on all nodes, or exclude the node"
            yield here.fault(f"data {path}", f"{path}: {problem}", todo)


def _dataset_fault(path: Path) -> str:
    """Return what is wrong with a dataset, or ""."""
    try:
        splits = json.loads((path / "manifest.json").read_bytes())["splits"]
        rows = [row for split in splits.values() for row in split["shards"]]
        files = [(row["file"], row["size"]) for row in rows]
        files += [(row["index"], row["index_size"]) for row in rows]
    except OSError as e:
        return f"its manifest.json can't be read: {_words(e)}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return "its manifest.json is damaged"
    bad = []
    for name, size in files:
        if "://" in name:
            continue
        try:
            have = (path / name).stat().st_size
            if have != size:
                bad.append(f"{name} has {have:,} bytes instead of {size:,}")
            elif not os.access(path / name, os.R_OK):
                bad.append(f"{name} is not readable")
        except OSError as e:
            bad.append(f"{name}: {_words(e)}")
    rest = f" (and {len(bad) - 1} more of {len(files)} files)" if len(bad) > 1 else ""
    return bad[0] + rest if bad else ""


def memory(here: Here) -> Iterator[NodeFault]:
    """Check that the memory that the job may use here is enough for the ranks."""
    bounds = dict(_memory_bounds(here.root, here.environment))
    if not bounds:
        return
    which = min(bounds, key=lambda name: bounds[name])
    here.facts |= {"memory": bounds[which], "memory_bound": which}
    needs, tasks = here.requirements.memory, here.requirements.tasks
    if needs is not None and bounds[which] < needs:
        ranks = f"its {tasks} ranks need" if tasks > 1 else "its rank needs"
        of = "is free" if which == "free" else "for the job"
        problem = f"{bounds[which] / _GIB:.1f} GiB of memory {of} where {ranks} "
        problem += f"{needs / _GIB:.1f} GiB"
        yield here.fault("memory", problem, "ask for more with slurm.mem, or exclude the node")


def _memory_bounds(root: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """Yield each limit on the memory of this process, as (name, bytes)."""
    with suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield "free", int(line.split()[1]) << 10
    share = environment.get("SLURM_MEM_PER_NODE", "")
    if share.isdigit() and int(share):  # 0: all there is
        yield "slurm", int(share) << 20
    limits = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            top, name = root / "sys/fs/cgroup", "memory.max"
            if "memory" in controllers.split(","):
                top, name = top / "memory", "memory.limit_in_bytes"
            elif controllers:
                continue
            group = top / path.lstrip("/")
            for place in (group, *group.parents):
                with suppress(OSError, ValueError):  # "max", or another namespace's path
                    limits.append(int((place / name).read_text()))
                if place == top:
                    break
    if limits:
        yield "cgroup", min(limits)


def gpus(here: Here) -> Iterator[NodeFault]:
    """Check that a task sees enough GPUs."""
    if not here.requirements.gpus:
        return
    count, why = count_gpus(here.root, here.environment)
    here.facts["gpus"] = count
    if count < here.requirements.gpus:
        have = f"sees {count} GPU{'s' if count > 1 else ''}" if count else "no GPU visible"
        verb = "are" if here.requirements.gpus > 1 else "is"
        problem = f"{have}{why} where {here.requirements.gpus} {verb} needed"
        yield here.fault("gpus", problem, "ask with slurm.gpus_per_node, or exclude the node")


def count_gpus(root: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """Return the number of GPUs that CUDA or ROCm would find, and a reason if some are missing."""
    why, present = "", 0
    command = shutil.which("nvidia-smi", path=environment.get("PATH"))
    listed = None
    if command:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    if listed and listed.returncode == 0:
        lines = [line.strip() for line in listed.stdout.splitlines()]
        slices = sum(line.startswith("MIG ") for line in lines)
        present = slices or sum(line.startswith("GPU ") for line in lines)
    elif (root / "dev/kfd").exists():  # AMD's; a node of the topology whose id is 0 is a CPU
        nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
        present = sum(path.read_text().strip() != "0" for path in nodes)
    elif listed:
        lines = (listed.stdout + listed.stderr).strip().splitlines() or [f"{listed.returncode}"]
        why = f" (nvidia-smi: {lines[0].rstrip('.')})"
    else:  # may include GPUs that cgroups hide from this job
        present = len(list((root / "proc/driver/nvidia/gpus").glob("*")))
    name = next((name for name in _VISIBLE if name in environment), None)
    if name is None:
        return present, why
    visible = environment[name]
    named = 0
    for device in visible.split(","):
        if device.strip() in ("", "-1", "NoDevFiles"):
            break
        named += 1
    if named < present:
        why = f" ({name}={visible})"
    return min(present, named), why


def work_of_gpus(here: Here) -> Iterator[NodeFault]:
    """Check that each GPU has its memory free, multiplies matrices and reaches the next one."""
    if not here.requirements.cuda:
        return
    here.importing = _GPUS
    trying = TorchGpus()
    here.importing = ""
    if not trying.names:
        todo = "see what nvidia-smi and python -c 'import torch; torch.zeros(1).cuda()' print there"
        yield here.fault("torch", "torch finds no GPU", todo)
    trial = try_gpus(trying)
    here.facts["gpu_tflops"] = [round(flops / 1e12, 1) for flops in trial.flops.values()]
    here.facts["gpu_gb_per_second"] = [round(rate / 1e9, 1) for rate in trial.links.values()]
    for problem in trial.problems:
        yield here.fault("a GPU", problem, "exclude the node, and have it looked at")


def scratch(here: Here) -> Iterator[NodeFault]:
    """Check that the local disk is writable and has free space."""
    if here.requirements.scratch is None:
        return
    path, needs = Path(here.requirements.scratch), here.requirements.scratch_bytes
    todo = "choose another slurm.scratch, or exclude the node"
    try:
        path.mkdir(parents=True, exist_ok=True)
        error = _unwritable(path, here.host)
    except OSError as e:
        error = _words(e)
    if error:
        yield here.fault("scratch", f"{path} can't be written to: {error}", todo)
        return
    free = here.facts["scratch_free"] = shutil.disk_usage(path).free
    if free < needs:
        problem = f"{free / _GIB:.1f} GiB are free at {path} where {needs / _GIB:.1f} are needed"
        yield here.fault("scratch", problem, todo)


def cpus(here: Here) -> Iterator[NodeFault]:
    """Check that each rank has a CPU. SLURM's count is preferred: this process may be bound to
    fewer CPUs than the ranks will have."""
    share = here.environment.get("SLURM_CPUS_ON_NODE", "")
    count = int(share) if share.isdigit() else len(os.sched_getaffinity(0))
    here.facts["cpus"] = count
    if count < here.requirements.tasks:
        problem = f"{count} CPU{'s' if count > 1 else ''} for the job where it has "
        problem += f"{here.requirements.tasks} ranks, which need one each"
        todo = "ask for more with slurm.cpus_per_task, or exclude the node"
        yield here.fault("cpus", problem, todo)


_GPUS = "the work of the GPUs"
CHECKS = {
    "the run's storage": run_directory,
    "the storage of the data": datasets,
    "the GPU driver": gpus,
    _GPUS: work_of_gpus,
    "the memory": memory,
    "the scratch disk": scratch,
    "the CPUs": cpus,
}


def run_checks(
    here: Here, seconds: float, checks: Mapping[str, Callable[[Here], Iterator[NodeFault]]] = CHECKS
) -> list[NodeFault]:
    """Run all checks at the same time; one that doesn't end in `seconds` is a fault."""
    results: dict[str, list[NodeFault]] = {}
    end = time.monotonic() + seconds

    def one(subject: str, work: Callable[[Here], Iterator[NodeFault]]) -> None:
        try:
            results[subject] = list(work(here))
        except Exception as e:
            problem = f"the check of {subject} failed: {e!r}"
            results[subject] = [here.fault(subject, problem, "fix the cause, or exclude the node")]

    threads = [threading.Thread(target=one, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    for subject in checks:
        problem, todo = f"{subject} did not answer in {seconds:.0f} s", "exclude the node"
        if waits := subject == here.importing:  # a slow file system: no reason to end the job
            problem, todo = f"{problem}: torch is still imported", "raise slurm.check_time"
        results.setdefault(subject, [here.fault(subject, problem, todo, note=waits)])
    return [fault for subject in checks for fault in results[subject]]
