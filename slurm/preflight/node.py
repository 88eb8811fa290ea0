"""The preflight of one node, `python -P -m forescale.slurm.preflight.node`: reports faults to the
supervisor.

Invariant: it ends in time, whatever hangs. The main thread only waits; other threads do what may
hang (storage, a driver, a peer). If the main thread hangs too, faulthandler ends the process. Exit
code 0: everything was reported, including faults; 1: the supervisor could not be reached.
"""

import faulthandler
import json
import os
import queue
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

from forescale.ground.rendezvous import free_port, open_store, use_interface_to
from forescale.slurm.preflight.checks import Here, run_checks
from forescale.slurm.preflight.collect import ADDRESS
from forescale.slurm.preflight.findings import Requirements, rounds

_CONNECT = 20.0  # seconds to reach the supervisor
_ANSWER = 120.0  # seconds for its first answer
_REPEATS = 3
# In errors of gloo, NCCL and the store: a peer ended or doesn't answer.
_LOST = re.compile(
    r"by peer|time(d )?out|refused|broken pipe|remote process|aborted", re.IGNORECASE
)
_LATE = 5.0  # seconds after its time until the process is killed


class Network:
    """Measures the network together with the other nodes. at: the current activity."""

    ALONE = "importing torch"  # every other activity needs the peers

    def __init__(self, here: Here, go: dict[str, Any], supervisor: str):
        self.here, self.go, self.supervisor = here, go, supervisor
        self.hosts: list[str] = go["hosts"]
        self.rank = self.hosts.index(here.host)
        self.at = self.ALONE

    def broken(self, how: str, lost: bool) -> dict[str, Any]:
        """Return the message for a failed measurement. lost: a peer is the likely cause."""
        problem = f"measuring the network failed while {self.at}: {how}"
        fault = {"problem": problem, "todo": "have its network looked at, or exclude it"}
        return {"broken": {**fault, "kind": "network"}, "lost": lost}

    def result(self) -> dict[str, Any]:
        """Measure, and return the message about it."""
        try:
            return self._measure()
        except Exception as e:
            first = re.sub(r"^\[.*?\] ", "", (str(e).strip() or repr(e)).splitlines()[0])
            return self.broken(first, lost=bool(_LOST.search(str(e))))

    def _measure(self) -> dict[str, Any]:
        use_interface_to(self.supervisor)
        import torch
        import torch.distributed as dist

        go, requirements = self.go, self.here.requirements
        self.at = f"meeting the others at {go['address']}"
        device = torch.device("cuda:0" if requirements.cuda else "cpu")
        seconds, size = max(1.0, go["seconds"] * 0.8), len(self.hosts)
        store = open_store(go["address"], go["port"], self.rank, size, seconds)
        dist.init_process_group(
            "nccl" if requirements.cuda else "gloo",
            store=store,
            rank=self.rank,
            world_size=size,
            timeout=timedelta(seconds=seconds),
        )
        mine = torch.ones(max(1, requirements.reduce_bytes // 4), device=device)
        received = torch.empty_like(mine)
        self.at = "reducing over all nodes"

        def exchange(other: int) -> None:
            both = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, received, other)]
            for work in dist.batch_isend_irecv(both):
                work.wait()

        # First, because NCCL's pairs need a group that is already connected.
        reduce = self._rate(partial(dist.all_reduce, mine))
        pairs = {}
        for pair in (p for r in rounds(len(self.hosts)) for p in r if self.rank in p):
            other = sum(pair) - self.rank
            self.at = f"exchanging with {self.hosts[other]}"
            pairs[self.hosts[other]] = self._rate(partial(exchange, other))
        return {"pairs": pairs, "reduce": reduce}

    def _rate(self, work: Callable[[], object]) -> float:
        """Return the best GB/s of a few repeats, after one to connect."""
        import torch

        best = float("inf")
        for repeat in range(_REPEATS + 1):
            began = time.perf_counter()
            work()
            if self.here.requirements.cuda:
                torch.cuda.synchronize()
            if repeat:
                best = min(best, time.perf_counter() - began)
        return self.here.requirements.reduce_bytes / best / 1e9


class Connection:
    """The TCP connection to the supervisor."""

    def __init__(self, host: str, port: int):
        end = time.monotonic() + _CONNECT
        while True:
            try:
                self.socket = socket.create_connection((host, port), timeout=5.0)
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
        self._buffer = b""

    def send(self, message: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Return the next message; None if the connection was closed. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            self.socket.settimeout(max(0.01, end - time.monotonic()))
            data = self.socket.recv(1 << 16)
            if not data:
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)


def clock(environment: Mapping[str, str], host: str) -> tuple[float, float | None]:
    """Return the time of this node, and by how many seconds a test has moved it (None: not)."""
    if environment.get("FORESCALE_FAKE_CLOCK_NODE") != host:
        return time.time(), None
    moved = float(environment.get("FORESCALE_FAKE_CLOCK", "0"))
    return time.time() + moved, moved


def serve(connection: Connection, token: str, host: str, supervisor: str) -> None:
    """Check the node, report, and take part in the measurement. Raises OSError if that fails."""
    sent, moved = clock(os.environ, host)
    connection.send({"token": token, "host": host, "time": sent})
    message = connection.receive(_ANSWER)
    received, _ = clock(os.environ, host)
    if message is None:
        raise ConnectionError("the supervisor did not accept this process as one of its nodes")
    seconds = message["seconds"]
    end = time.monotonic() + message["wait"]
    faulthandler.dump_traceback_later(message["wait"] + _LATE, exit=True)
    here = Here(host, Requirements(**message["requirements"]), message["mark"])
    if moved is not None:
        here.facts["fake_clock"] = moved
    began = time.monotonic()
    faults = [
        {k: v for k, v in asdict(f).items() if k != "host"} for f in run_checks(here, seconds / 2)
    ]
    here.facts["look_seconds"] = round(time.monotonic() - began, 3)
    report = {"facts": here.facts, "faults": faults, "received": received, "port": free_port()}
    connection.send(report)
    with suppress(OSError):  # the supervisor already has this node's report
        if go := connection.receive(end - time.monotonic()):
            until = min(end, time.monotonic() + go["seconds"])
            _take_part(connection, Network(here, go, supervisor), until)


def _take_part(connection: Connection, network: Network, end: float) -> None:
    """Measure, report, and stay until the supervisor closes the connection. Other nodes may need
    this process until they have measured, too."""
    results: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=lambda: results.put(network.result()), daemon=True).start()
    began, is_sent = time.monotonic(), False
    while (
        not select.select([connection.socket], [], [], 0.02)[0] and time.monotonic() < end + _LATE
    ):
        if not is_sent and not results.empty():
            connection.send(results.get())
            is_sent = True
        elif not is_sent and time.monotonic() > end:
            how = f"no end after {time.monotonic() - began:.0f} s"
            connection.send(network.broken(how, lost=network.at != Network.ALONE))
            is_sent = True


def main() -> int:
    """Run the preflight of this node and return the exit code."""
    faulthandler.register(signal.SIGUSR2)
    faulthandler.dump_traceback_later(_CONNECT + _ANSWER + _LATE, exit=True)
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    where, _, token = os.environ.get(ADDRESS, "").rpartition(":")
    address, _, port = where.rpartition(":")
    try:
        serve(Connection(address, int(port)), token, host, address)
    except (OSError, ValueError) as e:
        print(
            f"{host}: preflight: can't reach the supervisor at {where or '(no address)'}: {e}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # without waiting for threads that hang or for torch's cleanup
