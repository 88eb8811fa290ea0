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

from forescale.slurm.preflight import node
from forescale.slurm.preflight.collect import Preflight
from forescale.slurm.preflight.findings import ALL, Requirements
from tests.slurm.plain_requirements import PLAIN

ROOT = Path(__file__).parents[3]


def start(looks: Preflight, host: str, **environment: str) -> subprocess.Popen:
    words = {
        **{k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
        **looks.environment,
        "SLURMD_NODENAME": host,
        "SLURM_NODEID": str(looks.hosts.index(host)) if host in looks.hosts else "9",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.Popen([sys.executable, "-m", "forescale.slurm.preflight.node"], env=words)


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


def preflight(requirements: Requirements, *hosts: str) -> Preflight:
    return Preflight(requirements, list(hosts), "127.0.0.1")


def sentences(faults) -> list[str]:
    return [fault.sentence for fault in faults]


# Real processes


def test_nodes_that_are_well(requirements, tmp_path):
    looks = preflight(replace(requirements, memory=1, scratch=str(tmp_path / "scratch")), "a", "b")
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


@pytest.mark.slow  # waits for a node that never comes
def test_a_node_that_never_comes_is_named_and_so_is_a_clock(requirements):
    looks = preflight(replace(requirements, reduce=True), "a", "b", "c")
    fake = {"FORESCALE_FAKE_CLOCK": "-30", "FORESCALE_FAKE_CLOCK_NODE": "b"}
    with nodes(looks, "a", "b", **fake):
        report = looks.collect(lambda: False, 3, phase=lambda host: "unpacking")
    assert list(report.of_nodes) == ["b", "c"]
    assert report.of_nodes["b"].startswith("its clock is 30.0 s behind the first node's (a fake")
    assert report.of_nodes["c"].startswith("its preflight process did not start in 3 s (unpacking)")
    assert report.nodes["c"] == {}
    assert report.nodes["b"]["fake_clock"] == -30
    assert report.notes == [
        "the network was not measured, because some nodes are missing or faulty"
    ]


def test_what_all_nodes_lack_is_told_once_and_a_step_that_is_over_is_not_waited_for(tmp_path):
    (tmp_path / "file").touch()
    looks = preflight(replace(PLAIN, run=str(tmp_path / "file" / "run"), memory=2**60), "a", "b")
    with nodes(looks, "a", "b") as is_over:
        report = looks.collect(is_over, 20)
    run, memory = report.common
    assert run.sentence.startswith(f"{ALL}: {tmp_path}/file/run can't be written to: is a file")
    assert memory.host == ALL
    assert "its rank needs" in memory.problem
    assert report.of_nodes == {}

    looks = preflight(PLAIN, "a", "b")
    began = time.monotonic()
    report = looks.collect(lambda: True, 20)
    assert time.monotonic() - began < 2
    assert "never connected" in report.common[0].problem


def test_strangers_are_not_believed(requirements):
    looks = preflight(requirements, "a")
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
    assert "did not start" in report.faults[0].problem
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
    assert "can't reach the supervisor at 127.0.0.1:1" in capfd.readouterr().err


@pytest.mark.slow  # nodes in processes of their own
def test_the_network_is_measured(requirements):
    hosts = ["a", "b", "c"]
    looks = preflight(replace(requirements, reduce=True, reduce_bytes=1 << 20, slow=1e6), *hosts)
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
LOST = {"broken": {"problem": "closed by peer", "todo": "look", "kind": "network"}, "lost": True}


def collected(requirements: Requirements, **words: list[dict]):
    """The report of a preflight whose nodes say these words."""
    looks = preflight(requirements, *words)
    threads = [play(looks, host, *of_host) for host, of_host in words.items()]
    report = looks.collect(lambda: False, 10)
    for thread in threads:
        thread.join()
    return report


def measured(requirements: Requirements, rates: dict[str, dict], reduce: dict[str, float]):
    words = {host: {"pairs": pairs, "reduce": reduce[host]} for host, pairs in rates.items()}
    requirements = replace(requirements, reduce=True)
    return collected(requirements, **{host: [CHECKED, word] for host, word in words.items()})


def test_who_breaks_off_the_measuring_is_blamed_and_not_those_that_lost_it(requirements):
    broken = {"broken": {"problem": "CUDA error", "todo": "look", "kind": "network"}, "lost": False}
    words = {"a": [CHECKED, LOST], "b": [CHECKED, broken], "c": [CHECKED, LOST]}
    report = collected(replace(requirements, reduce=True), **words)
    assert report.of_nodes == {"b": "CUDA error; look"}
    assert report.gb_per_second is None


def test_a_network_that_fails_for_all_is_a_fault_of_all(requirements):
    words = {"a": [CHECKED, LOST], "b": [CHECKED, LOST]}
    report = collected(replace(requirements, reduce=True), **words)
    assert sentences(report.common) == ["all nodes: closed by peer; look"]


def test_of_two_nodes_nobody_is_called_slow(requirements):
    requirements = replace(requirements, min_gb_per_second=2.0)
    report = measured(requirements, {"a": {"b": 0.5}, "b": {"a": 0.6}}, {"a": 0.4, "b": 0.3})
    assert report.faults == []
    assert report.gb_per_second == 0.3
    assert report.notes[0].startswith("a and b: 0.50 GB/s between them, below 2")


def test_a_slow_node_is_named(requirements):
    rates = {"a": {"b": 1.0, "c": 9.0}, "b": {"a": 1.0, "c": 1.1}, "c": {"a": 9.0, "b": 1.1}}
    report = measured(requirements, rates, dict.fromkeys(rates, 1.0))
    assert list(report.of_nodes) == ["b"]
    assert report.of_nodes["b"].startswith("1.10 GB/s at best with its neighbours; the median is 9")


def test_a_process_that_dies_before_it_has_spoken_is_named(requirements):
    report = collected(requirements, a=[], b=[CHECKED])
    assert "ended without a report" in report.of_nodes["a"]
    assert list(report.of_nodes) == ["a"]
