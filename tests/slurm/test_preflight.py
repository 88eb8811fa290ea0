"""The look at every node before ranks start: real processes of one host stand for nodes."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from slurm import looks as looks_of
from slurm import node
from slurm.findings import ALL, Fault, Report, Wanted, rounds, skew_of, slow_nodes
from slurm.preflight import Preflight

ROOT = Path(__file__).parents[2]
PLAIN = Wanted(".", [], 1, 0, None, None, 0, reduce=False)
DATASET = {"file": "train-000000.tar", "size": 7, "index": "train-000000.index.json"}


def start(looks: Preflight, host: str, **environment: str) -> subprocess.Popen:
    words = {
        **{k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
        **looks.environment,
        "SLURMD_NODENAME": host,
        "SLURM_NODEID": str(looks.hosts.index(host)) if host in looks.hosts else "9",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.Popen([sys.executable, "-m", "slurm.node"], env=words)


@contextmanager
def nodes(looks: Preflight, *hosts: str, **environment: str):
    """Their processes; whether all have ended."""
    running = [start(looks, host, **environment) for host in hosts]
    try:
        yield lambda: all(p.poll() is not None for p in running)
        assert [p.wait(20) for p in running] == [0] * len(running)
    finally:
        for p in running:
            p.kill()
            p.wait()


def preflight(wanted: Wanted, *hosts: str) -> Preflight:
    return Preflight(wanted, list(hosts), "127.0.0.1")


def here(wanted: Wanted, root: Path = Path("/nothing"), mark: str = "", **environment: str):
    return looks_of.Here("n3", wanted, mark, root, environment)


def sentences(found) -> list[str]:
    return [fault.sentence for fault in found]


@pytest.fixture
def wanted(tmp_path) -> Wanted:
    return replace(PLAIN, run=str(tmp_path))


@pytest.fixture
def shards(tmp_path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    (path / "train-000000.tar").write_bytes(bytes(7))
    (path / "train-000000.index.json").write_bytes(bytes(3))
    manifest = {"splits": {"train": {"shards": [{**DATASET, "index_size": 3}]}}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


# Real processes


def test_nodes_that_are_well(wanted, tmp_path):
    looks = preflight(replace(wanted, memory=1, scratch=str(tmp_path / "scratch")), "a", "b")
    with nodes(looks, "a", "b") as is_over:
        report = looks.collect(is_over, 20)
    assert (report.faults, report.notes, report.common, report.of_nodes) == ([], [], [], {})
    assert report.gb_per_second is None
    for facts in report.nodes.values():
        assert facts["address"] == "127.0.0.1"
        assert facts["memory"] > 0
        assert facts["cpus"] > 0
        assert facts["scratch_free"] > 0
        assert abs(facts["skew_seconds"]) < 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scratch"]


def test_a_node_that_never_comes_is_named_and_so_is_a_clock(wanted):
    looks = preflight(replace(wanted, reduce=True), "a", "b", "c")
    fake = {"FORESCALE_FAKE_CLOCK": "-30", "FORESCALE_FAKE_CLOCK_NODE": "b"}
    with nodes(looks, "a", "b", **fake):
        report = looks.collect(lambda: False, 3)
    assert list(report.of_nodes) == ["b", "c"]
    assert report.of_nodes["b"].startswith("its clock is 30.0 s behind the first node's (a fake")
    assert report.of_nodes["c"].startswith("did not answer in 3 s; the others did in ")
    assert report.nodes["c"] == {}
    assert report.nodes["b"]["fake_clock"] == -30
    assert report.notes == ["the network was not measured: not all nodes are there and well"]


def test_what_all_nodes_lack_is_told_once_and_a_step_that_is_over_is_not_waited_for(tmp_path):
    (tmp_path / "file").touch()
    looks = preflight(replace(PLAIN, run=str(tmp_path / "file" / "run"), memory=2**60), "a", "b")
    with nodes(looks, "a", "b") as is_over:
        report = looks.collect(is_over, 20)
    run, memory = report.common
    assert run.sentence.startswith(f"{ALL}: {tmp_path}/file/run can't be written to: a file stands")
    assert memory.host == ALL
    assert "its rank needs" in memory.what
    assert report.of_nodes == {}

    looks = preflight(PLAIN, "a", "b")
    began = time.monotonic()
    report = looks.collect(lambda: True, 20)
    assert time.monotonic() - began < 2
    assert "never came" in report.common[0].what


def test_strangers_are_not_believed(wanted):
    looks = preflight(wanted, "a")
    lies = [
        {"token": "wrong", "host": "a", "time": 0.0},
        {"token": "ü", "host": "a", "time": 0.0},
        {"token": looks.token, "host": "unknown", "time": 0.0},
        ["a list"],
    ]
    lines = [socket.create_connection(("127.0.0.1", looks.port)) for _ in lies]
    for line, lie in zip(lines, lies, strict=True):
        line.sendall(json.dumps(lie).encode() + b"\n")
    report = looks.collect(lambda: False, 0.5)
    assert "did not answer" in report.faults[0].what
    for line in lines:
        line.settimeout(5)
        assert line.recv(100) == b""
        line.close()


def test_a_node_without_a_supervisor_says_so(monkeypatch, capfd):
    monkeypatch.setattr(node, "_CONNECT", 0.1)
    monkeypatch.setenv("FORESCALE_PREFLIGHT", "127.0.0.1:1:token")
    try:
        assert node.main() == 1
    finally:
        node.faulthandler.cancel_dump_traceback_later()
    assert "can't talk to 127.0.0.1:1" in capfd.readouterr().err


def test_the_network_is_measured(wanted):
    hosts = ["a", "b", "c"]
    looks = preflight(replace(wanted, reduce=True, reduce_bytes=1 << 20, slow=1e6), *hosts)
    with nodes(looks, *hosts) as is_over:
        report = looks.collect(is_over, 60)
    assert report.faults == []
    assert report.notes == []
    assert report.gb_per_second > 0
    assert all(report.nodes[host]["gb_per_second"] > 0 for host in hosts)


# A node as a test plays it


def play(looks: Preflight, host: str, *words: dict) -> threading.Thread:
    """Say the first word after the greeting, the next after the supervisor's go; then leave."""

    def run() -> None:
        with socket.create_connection(("127.0.0.1", looks.port)) as s, s.makefile() as lines:
            greeting = {"token": looks.token, "host": host, "time": time.time()}
            s.sendall(json.dumps(greeting).encode() + b"\n")
            for word in words:
                lines.readline()
                s.sendall(json.dumps({"received": time.time(), **word}).encode() + b"\n")
            if len(words) > 1:
                lines.readline()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


CHECKED = {"facts": {}, "faults": [], "port": 1}
LOST = {"broken": {"what": "closed by peer", "todo": "look", "kind": "network"}, "lost": True}


def test_who_breaks_off_the_measuring_is_blamed_and_not_those_that_lost_it(wanted):
    broken = {"what": "CUDA error", "todo": "look", "kind": "network"}
    looks = preflight(replace(wanted, reduce=True), "a", "b", "c")
    threads = [
        play(looks, "a", CHECKED, LOST),
        play(looks, "b", CHECKED, {"broken": broken, "lost": False}),
        play(looks, "c", CHECKED, LOST),
    ]
    report = looks.collect(lambda: False, 10)
    assert report.of_nodes == {"b": "CUDA error; look"}
    assert report.gb_per_second is None
    for thread in threads:
        thread.join()


def test_a_network_that_fails_for_all_is_a_fault_of_all(wanted):
    looks = preflight(replace(wanted, reduce=True), "a", "b")
    threads = [play(looks, host, CHECKED, LOST) for host in ("a", "b")]
    report = looks.collect(lambda: False, 10)
    assert sentences(report.common) == ["all nodes: closed by peer; look"]
    for thread in threads:
        thread.join()


def test_of_two_nodes_nobody_is_called_slow(wanted):
    wanted = replace(wanted, reduce=True, min_gb_per_second=2.0)
    looks = preflight(wanted, "a", "b")
    threads = [
        play(looks, "a", CHECKED, {"pairs": {"b": 0.5}, "reduce": 0.4}),
        play(looks, "b", CHECKED, {"pairs": {"a": 0.6}, "reduce": 0.3}),
    ]
    report = looks.collect(lambda: False, 10)
    assert report.faults == []
    assert report.gb_per_second == 0.3
    assert report.notes[0].startswith("a and b: 0.50 GB/s between them, below 2")
    for thread in threads:
        thread.join()


def test_a_slow_node_is_named(wanted):
    rates = {"a": {"b": 1.0, "c": 9.0}, "b": {"a": 1.0, "c": 1.1}, "c": {"a": 9.0, "b": 1.1}}
    looks = preflight(replace(wanted, reduce=True), *rates)
    threads = [
        play(looks, host, CHECKED, {"pairs": pairs, "reduce": 1.0}) for host, pairs in rates.items()
    ]
    report = looks.collect(lambda: False, 10)
    assert list(report.of_nodes) == ["b"]
    assert report.of_nodes["b"].startswith("1.10 GB/s at best with its neighbours; the median is 9")
    for thread in threads:
        thread.join()


def test_a_process_that_dies_before_it_has_spoken_is_named(wanted):
    looks = preflight(wanted, "a", "b")
    threads = [play(looks, "a"), play(looks, "b", CHECKED)]
    report = looks.collect(lambda: False, 10)
    assert "ended without a word" in report.of_nodes["a"]
    assert list(report.of_nodes) == ["a"]
    for thread in threads:
        thread.join()


# Judgements


def test_common_faults_and_those_of_nodes():
    memory = [Fault(h, f"{i} GiB of memory", "ask", "memory") for i, h in enumerate("ab")]
    disk = [Fault("b", "disk full", "clean", "run"), Fault("b", "no GPU visible", "ask", "gpus")]
    report = Report([*memory, *disk], [], {"a": {}, "b": {}}, None, 1.0)
    assert sentences(report.common) == ["all nodes: 0 GiB of memory (so a; the others alike); ask"]
    assert report.of_nodes == {"b": "disk full; clean; also no GPU visible"}
    alone = Report(disk, [], {"b": {}}, None, 1.0)
    assert alone.common == disk
    assert alone.of_nodes == {}


@pytest.mark.parametrize("count", range(1, 9))
def test_rounds_are_a_ring_of_disjoint_pairs(count):
    found = rounds(count)
    for pairs in found:
        ends = [end for pair in pairs for end in pair]
        assert len(ends) == len(set(ends))
    ring = {frozenset((i, (i + 1) % count)) for i in range(count)} if count > 1 else set()
    pairs = [frozenset(p) for pairs in found for p in pairs]
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


# Looks


def test_datasets(shards, wanted):
    def look(*paths) -> list[str]:
        return sentences(looks_of.datasets(here(replace(wanted, data=[*map(str, paths)]))))

    tar = shards / "train-000000.tar"
    assert look(shards, "s3://bucket/data") == []
    tar.write_bytes(bytes(5))
    assert f"n3: {shards}: train-000000.tar has 5 bytes where 7 belong" in look(shards)[0]
    tar.unlink()
    (shards / "train-000000.index.json").unlink()
    found = look(shards, shards / "elsewhere")
    assert "train-000000.tar: no such file or directory (and 1 more of 2 files)" in found[0]
    assert "elsewhere: its manifest.json can't be read: no such file" in found[1]
    (shards / "manifest.json").write_text("{")
    assert "its manifest.json is damaged" in look(shards)[0]


def test_a_real_dataset_is_well(dataset, wanted):
    assert sentences(looks_of.datasets(here(replace(wanted, data=[str(dataset)])))) == []


def test_run_directory(tmp_path, wanted, monkeypatch):
    assert [f for f in looks_of.run_directory(here(wanted)) if not f.note] == []
    assert list(tmp_path.iterdir()) == []
    missing = replace(wanted, run=str(tmp_path / "missing"))
    assert (
        "can't be written to: no such file" in sentences(looks_of.run_directory(here(missing)))[0]
    )
    other = sentences(looks_of.run_directory(here(wanted, mark="mark")))
    assert "is not the directory that the first node sees" in other[0]
    monkeypatch.setattr(looks_of, "_LITTLE", 2**80)
    little = list(looks_of.run_directory(here(wanted)))
    assert little[0].note
    assert "GiB are free at" in little[0].what


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
    wanted = replace(PLAIN, memory=5 << 30, tasks=2)
    look = here(wanted, root, SLURM_MEM_PER_NODE=share)
    found = sentences(looks_of.memory(look))
    assert look.facts == {"memory": gib << 30, "memory_bound": bound}
    of = "is free" if bound == "free" else "for the job"
    what = f"n3: {gib}.0 GiB of memory {of} where its 2 ranks need 5.0 GiB; ask for more"
    assert [s.startswith(what) for s in found] == ([True] if gib < 5 else [])


def test_gpus(tmp_path):
    def look(count: int, listed: str | None = None, code: int = 0, **environment: str):
        if listed is not None:
            tool = tmp_path / "nvidia-smi"
            tool.write_text(f"#!/bin/sh\ncat <<'E'\n{listed}\nE\nexit {code}\n")
            tool.chmod(0o755)
            environment["PATH"] = str(tmp_path)
        wanted = replace(PLAIN, gpus=count)
        return [
            f.what for f in looks_of.gpus(here(wanted, tmp_path, **{"PATH": "", **environment}))
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


def test_scratch_and_cpus(tmp_path):
    (tmp_path / "file").touch()
    full = replace(PLAIN, scratch=str(tmp_path), scratch_bytes=2**60)
    assert "are free at" in sentences(looks_of.scratch(here(full)))[0]
    wrong = replace(PLAIN, scratch=str(tmp_path / "file/x"))
    assert "can't be written to: a file stands" in sentences(looks_of.scratch(here(wrong)))[0]
    two = replace(PLAIN, tasks=2)
    assert sentences(looks_of.cpus(here(two, SLURM_CPUS_ON_NODE="2"))) == []
    assert "1 CPU for the job" in sentences(looks_of.cpus(here(two, SLURM_CPUS_ON_NODE="1")))[0]


def test_a_look_that_hangs_or_breaks_is_a_fault():
    def hangs(_):
        time.sleep(3)
        yield

    def breaks(_):
        raise RuntimeError("bang")
        yield

    looks = {"the disk": hangs, "the card": breaks, "the CPUs": looks_of.cpus}
    found = sentences(looks_of.look(here(PLAIN), 0.2, looks))
    assert "n3: the disk did not answer in 0 s" in found[0]
    assert "looking at the card failed: RuntimeError('bang')" in found[1]
    assert len(found) == 2


def test_the_interface_of_a_host():
    assert node.interface_to("localhost") is node.interface_to("127.0.0.1") is None
    assert node.interface_to(socket.gethostname()) in [None, *os.listdir("/sys/class/net")]
