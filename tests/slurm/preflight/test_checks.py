"""What a node finds when it looks around, and what is made of the findings: without processes."""

import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from forescale.ground.rendezvous import interface_to
from forescale.slurm.preflight import checks
from forescale.slurm.preflight.findings import (
    NodeFault,
    PreflightReport,
    Requirements,
    rounds,
    skew_of,
    slow_nodes,
)
from tests.slurm.plain_requirements import PLAIN
from tests.trainer.monitor.mock_gpus import MockGpus

DATASET = {"file": "train-000000.tar", "size": 7, "index": "train-000000.index.json"}


def here(
    requirements: Requirements, root: Path = Path("/nothing"), mark: str = "", **environment: str
):
    return checks.Here("n3", requirements, mark, root, environment)


def sentences(faults) -> list[str]:
    return [fault.sentence for fault in faults]


@pytest.fixture
def shards(tmp_path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    (path / "train-000000.tar").write_bytes(bytes(7))
    (path / "train-000000.index.json").write_bytes(bytes(3))
    manifest = {"splits": {"train": {"shards": [{**DATASET, "index_size": 3}]}}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_common_faults_and_those_of_nodes():
    memory = [NodeFault(h, f"{i} GiB of memory", "ask", "memory") for i, h in enumerate("ab")]
    disk = [
        NodeFault("b", "disk full", "clean", "run"),
        NodeFault("b", "no GPU visible", "ask", "gpus"),
    ]
    report = PreflightReport([*memory, *disk], [], {"a": {}, "b": {}}, None, 1.0)
    assert sentences(report.common) == [
        "all nodes: 0 GiB of memory (on a; similar on the others); ask"
    ]
    assert report.of_nodes == {"b": "disk full; clean; also no GPU visible"}
    alone = PreflightReport(disk, [], {"b": {}}, None, 1.0)
    assert alone.common == disk
    assert alone.of_nodes == {}


@pytest.mark.parametrize("count", range(1, 9))
def test_rounds_are_a_ring_of_disjoint_pairs(count):
    turns = rounds(count)
    for pairs in turns:
        ends = [end for pair in pairs for end in pair]
        assert len(ends) == len(set(ends))
    ring = {frozenset((i, (i + 1) % count)) for i in range(count)} if count > 1 else set()
    pairs = [frozenset(p) for pairs in turns for p in pairs]
    assert set(pairs) == ring
    assert len(pairs) == len(ring)


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_one_slow_node_is_found_wherever_it_is(count):
    for guilty in range(count):
        pairs = {
            (str(a), str(b)): 1.0 if guilty in (a, b) else 10.0
            for pairs in rounds(count)
            for a, b in pairs
        }
        assert list(slow_nodes(pairs, 3.0)) == [str(guilty)]
    assert slow_nodes({("a", "b"): 1.0}, 3.0) == {}


def test_delays_are_no_skew():
    assert skew_of(100.0, 100.0, 100.001) == 0.0  # no skew
    assert skew_of(100.0, 105.0, 105.1) == 0.0  # we answered late
    assert skew_of(130.0, 100.0, 130.5) == 30.0
    assert skew_of(70.0, 100.0, 70.5) == -29.5


def test_datasets(shards, requirements):
    def look(*paths) -> list[str]:
        return sentences(checks.datasets(here(replace(requirements, data=[*map(str, paths)]))))

    tar = shards / "train-000000.tar"
    assert look(shards, "s3://bucket/data") == []
    tar.write_bytes(bytes(5))
    assert f"n3: {shards}: train-000000.tar has 5 bytes instead of 7" in look(shards)[0]
    tar.unlink()
    (shards / "train-000000.index.json").unlink()
    problems = look(shards, shards / "elsewhere")
    assert "train-000000.tar: no such file or directory (and 1 more of 2 files)" in problems[0]
    assert "elsewhere: its manifest.json can't be read: no such file" in problems[1]
    (shards / "manifest.json").write_text("{")
    assert "its manifest.json is damaged" in look(shards)[0]


def test_a_real_dataset_is_well(dataset, requirements):
    assert sentences(checks.datasets(here(replace(requirements, data=[str(dataset)])))) == []


def test_run_directory(tmp_path, requirements, monkeypatch):
    assert [f for f in checks.run_directory(here(requirements)) if not f.note] == []
    assert list(tmp_path.iterdir()) == []
    missing = replace(requirements, run=str(tmp_path / "missing"))
    assert "can't be written to: no such file" in sentences(checks.run_directory(here(missing)))[0]
    other = sentences(checks.run_directory(here(requirements, mark="mark")))
    assert "is not the directory that the first node sees" in other[0]
    monkeypatch.setattr(checks, "_LITTLE", 2**80)
    little = list(checks.run_directory(here(requirements)))
    assert little[0].note
    assert "GiB are free at" in little[0].problem


def memory_root(root: Path, available: int, cgroup: str = "", **files: str) -> Path:
    """A /proc and a /sys as memory looks at them; KiB."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {available} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for path, text in files.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


V1 = {
    "memory/slurm/job_1/step_0/memory.limit_in_bytes": "9223372036854771712",
    "memory/slurm/job_1/memory.limit_in_bytes": str(3 << 30),
}


@pytest.mark.parametrize(
    ("cgroup", "files", "share", "gib", "bound"),
    [
        ("", {}, "", 8, "free"),
        ("", {}, "0", 8, "free"),
        ("", {}, "2048", 2, "slurm"),
        ("4:memory:/slurm/job_1/step_0\n0::/\n", V1, "", 3, "cgroup"),
        ("0::/a/b\n", {"a/memory.max": f"{1 << 30}\n", "a/b/memory.max": "max\n"}, "", 1, "cgroup"),
        ("0::/elsewhere\n", {"memory.max": "max\n"}, "", 8, "free"),
    ],
)
def test_memory_is_what_the_job_may_use(tmp_path, cgroup, files, share, gib, bound):
    root = memory_root(tmp_path, 8 << 20, cgroup, **files)
    requirements = replace(PLAIN, memory=5 << 30, tasks=2)
    look = here(requirements, root, SLURM_MEM_PER_NODE=share)
    problems = sentences(checks.memory(look))
    assert look.facts == {"memory": gib << 30, "memory_bound": bound}
    of = "is free" if bound == "free" else "for the job"
    problem = f"n3: {gib}.0 GiB of memory {of} where its 2 ranks need 5.0 GiB; ask for more"
    assert [s.startswith(problem) for s in problems] == ([True] if gib < 5 else [])


def test_gpus(tmp_path):
    def look(count: int, listed: str | None = None, code: int = 0, **environment: str):
        if listed is not None:
            tool = tmp_path / "nvidia-smi"
            tool.write_text(f"#!/bin/sh\ncat <<'E'\n{listed}\nE\nexit {code}\n")
            tool.chmod(0o755)
            environment["PATH"] = str(tmp_path)
        requirements = replace(PLAIN, gpus=count)
        return [
            f.problem
            for f in checks.gpus(here(requirements, tmp_path, **{"PATH": "", **environment}))
        ]

    eight = "\n".join(f"GPU {i}: NVIDIA H100 (UUID: GPU-{i})" for i in range(8))
    sliced = "GPU 0: A100 (UUID: GPU-0)\n  MIG 1g Device 0: (x)\n  MIG 1g Device 1: (y)"
    assert look(0) == []
    assert look(8) == ["no GPU visible where 8 are needed"]
    assert look(8, eight.replace("GPU 7", "Unable 7")) == ["sees 7 GPUs where 8 are needed"]
    few = look(8, eight, CUDA_VISIBLE_DEVICES="0,1,2")
    assert few == ["sees 3 GPUs (CUDA_VISIBLE_DEVICES=0,1,2) where 8 are needed"]
    assert look(1, eight, CUDA_VISIBLE_DEVICES="-1") != []
    assert look(8, eight) == look(2, sliced) == []
    failed = look(1, "NVIDIA-SMI has failed.", 9)
    assert failed == ["no GPU visible (nvidia-smi: NVIDIA-SMI has failed) where 1 is needed"]
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    assert look(1) == []


def test_gpus_of_amd(tmp_path):
    for node, id in enumerate(("0", "51110", "23012")):  # a CPU first
        path = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{node}/gpu_id"
        path.parent.mkdir(parents=True)
        path.write_text(f"{id}\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    assert checks.count_gpus(tmp_path, {"PATH": ""}) == (2, "")
    some = {"PATH": "", "ROCR_VISIBLE_DEVICES": "1"}
    assert checks.count_gpus(tmp_path, some) == (1, " (ROCR_VISIBLE_DEVICES=1)")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: H100'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert checks.count_gpus(tmp_path, {"PATH": str(tmp_path)}) == (1, ""), "beside graphics of AMD"


def test_each_gpu_of_a_node_is_tried(monkeypatch):
    def look(gpus, **facts):
        monkeypatch.setattr(checks, "TorchGpus", lambda: gpus)
        this = here(replace(PLAIN, cuda=True, **facts))
        return sentences(checks.work_of_gpus(this)), this.facts

    problems, facts = look(MockGpus(4, errors={2: "CUDA error: ECC"}, links={(3, 0): 1e9}))
    assert problems[0].startswith("n3: GPU 2: CUDA error: ECC; exclude the node")
    assert facts == {"gpu_tflops": [700.0] * 3, "gpu_gb_per_second": [200.0, 1.0]}
    assert [problem[:19] for problem in problems[1:]] == ["n3: GPUs 3 and 0: c"]
    assert "torch finds no GPU" in look(MockGpus(0))[0][0]
    assert [*checks.work_of_gpus(here(PLAIN))] == []


def test_a_slow_import_of_torch_is_no_fault_of_the_gpus(monkeypatch):
    """On a file system that many nodes import from, it takes minutes."""

    def slow():
        time.sleep(1)

    monkeypatch.setattr(checks, "TorchGpus", slow)
    looks = {name: work for name, work in checks.CHECKS.items() if work is checks.work_of_gpus}
    (fault,) = checks.run_checks(here(replace(PLAIN, cuda=True)), 0.2, looks)
    assert fault.note
    assert "torch is still imported" in fault.problem


def test_scratch_and_cpus(tmp_path):
    (tmp_path / "file").touch()
    full = replace(PLAIN, scratch=str(tmp_path), scratch_bytes=2**60)
    assert "are free at" in sentences(checks.scratch(here(full)))[0]
    wrong = replace(PLAIN, scratch=str(tmp_path / "file/x"))
    assert "can't be written to: is a file" in sentences(checks.scratch(here(wrong)))[0]
    two = replace(PLAIN, tasks=2)
    assert sentences(checks.cpus(here(two, SLURM_CPUS_ON_NODE="2"))) == []
    assert "1 CPU for the job" in sentences(checks.cpus(here(two, SLURM_CPUS_ON_NODE="1")))[0]


def test_a_look_that_hangs_or_breaks_is_a_fault():
    def hangs(_):
        time.sleep(3)
        yield

    def breaks(_):
        raise RuntimeError("bang")
        yield

    looks = {"the disk": hangs, "the card": breaks, "the CPUs": checks.cpus}
    problems = sentences(checks.run_checks(here(PLAIN), 0.2, looks))
    assert "n3: the disk did not answer in 0 s" in problems[0]
    assert "the check of the card failed: RuntimeError('bang')" in problems[1]
    assert len(problems) == 2


def test_the_interface_of_a_host():
    assert interface_to("localhost") is interface_to("127.0.0.1") is None
    assert interface_to(socket.gethostname()) in [None, *os.listdir("/sys/class/net")]
