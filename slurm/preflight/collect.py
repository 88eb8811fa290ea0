"""The preflight, before ranks start: collects a report from every node and judges them.

    the supervisor (Preflight)             a node (node.py); each message is a line of JSON
                                       <-  token, host, time
    wanted, mark, seconds, wait        ->
                                       <-  facts, faults, received (its clock), port (a free one)
    go, or the connection is closed    ->
                                       <-  pairs, reduce; or fault, lost

Three times are limited apart: until a node's process connects, which is longer where an image or an
environment is copied first; the checks of the nodes that came; the measurement.

Invariant: only processes with the token are accepted; every host ends with a complete report or a
fault of its own, which names what the node was doing. Imports no torch.
"""

import json
import resource
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median_high
from typing import Any

from forescale.ground.rendezvous import meeting_address
from forescale.slurm.preflight.findings import (
    NodeFault,
    PreflightReport,
    Requirements,
    best_pairs,
    merged,
    skew_of,
    slow_nodes,
)

ADDRESS = "FORESCALE_PREFLIGHT"  # host:port:token of the supervisor
_GRACE = 2.0  # seconds for other reports after a node has failed to measure
_STRANGER, _KNOWN = 1 << 12, 1 << 24  # most bytes of a line before and after the token was checked


@dataclass
class _Node:
    """The reports of a host so far. connected: when, by our monotonic clock; seconds: that its
    checks took; broken: a failure of the measurement; lost: that only means that a peer did not
    answer."""

    host: str
    line: "_Line | None" = None  # while it is connected
    came: bool = False
    sent: float = 0.0
    connected: float = 0.0
    answered: float = 0.0
    seconds: float | None = None
    port: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    faults: list[NodeFault] = field(default_factory=list)
    pairs: dict[str, float] | None = None
    reduce: float = 0.0
    broken: NodeFault | None = None
    lost: bool = False

    def fault(self, problem: str, todo: str, kind: str) -> NodeFault:
        return NodeFault(self.host, problem, todo, kind)

    @property
    def failed(self) -> bool:
        """True if this node itself failed to measure, not only a peer of it."""
        return self.pairs is None and (not self.lost if self.broken else self.line is None)


@dataclass
class _Line:
    socket: socket.socket
    node: _Node | None = None  # None: its token is not yet checked
    buffer: bytes = b""

    def send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # a closed connection is noticed when reading
            self.socket.sendall(json.dumps(message).encode() + b"\n")


class Preflight:
    """A server for the nodes' processes, on a free port of one address. hosts: SLURM's names of the
    nodes; address: a name or address of this host."""

    def __init__(self, requirements: Requirements, hosts: list[str], address: str):
        self.requirements, self.hosts = requirements, list(hosts)
        self.address = meeting_address(address)
        self.token = secrets.token_hex(16)
        self._nodes = {host: _Node(host) for host in hosts}
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < len(hosts) + 256:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        self._server = socket.create_server((self.address, 0), family=family, backlog=4096)
        self.port: int = self._server.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ, None)
        self._measuring = 0.0  # when it began, by our monotonic clock
        self._mark = Path(requirements.run) / f".preflight-{self.token[:8]}"
        try:  # a node that doesn't see this file has another directory of that name
            self._mark.touch()
        except OSError:
            self._mark = Path()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for the nodes' processes, beside SLURM's own."""
        return {ADDRESS: f"{self.address}:{self.port}:{self.token}"}

    def collect(
        self,
        is_over: Callable[[], bool],
        timeout: float,
        starting: float | None = None,
        phase: Callable[[str], str | None] = lambda host: None,
    ) -> PreflightReport:
        """Return the report once all nodes have reported, their step has ended, or time is up. Call
        it once: it closes the server, which also ends the nodes' processes. timeout: seconds for
        the checks, and again for the measurement; starting: seconds until the nodes' processes must
        have connected, if not the same; phase: what a host that didn't connect was doing, if known
        """
        self._began, self._timeout = time.monotonic(), timeout
        self._starting = timeout if starting is None else starting
        failed, over = 0.0, False
        try:
            while time.monotonic() < self._end and not self._have_all():
                events = self._selector.select(0.1)
                for key, _ in events:
                    if key.data is not None:
                        self._read(key.data)
                        continue
                    with suppress(OSError):
                        taken = self._server.accept()[0]
                        taken.settimeout(5.0)
                        self._selector.register(taken, selectors.EVENT_READ, _Line(taken))
                if over and not events:
                    break
                over = over or is_over()  # earlier messages may still arrive
                if self._measuring and any(n.failed for n in self._nodes.values()):
                    failed = failed or time.monotonic()
                    if time.monotonic() - failed > _GRACE:
                        break
            return self._report(time.monotonic() - self._began, over, phase)
        finally:
            self.close()

    @property
    def _end(self) -> float:
        """When the current one of the three times is up, by our monotonic clock."""
        nodes = self._nodes.values()
        if self._measuring:
            return self._measuring + self._timeout
        if all(n.came for n in nodes):
            return max(n.connected for n in nodes) + self._timeout
        return self._began + self._starting

    def close(self) -> None:
        """Close the server and all connections, and remove the file in the run directory."""
        if self._server.fileno() < 0:
            return
        for key in list(self._selector.get_map().values()):
            (key.data.socket if key.data else self._server).close()
        self._selector.close()
        if self._mark.name:
            with suppress(OSError):
                self._mark.unlink()

    def _have_all(self) -> bool:
        """True if no more reports are expected. Starts the measurement after all checks."""
        nodes = self._nodes.values()
        if self._measuring:
            return all(n.pairs is not None or n.broken or not n.line for n in nodes)
        if any(n.seconds is None and (n.line or not n.came) for n in nodes):
            return False
        well = all(n.line and all(f.note for f in n.faults) for n in nodes)
        if not (self.requirements.reduce and len(nodes) > 1 and well):
            return True
        self._measuring = time.monotonic()
        first = self._nodes[self.hosts[0]]
        go = {
            "hosts": self.hosts,
            "address": first.facts["address"],
            "port": first.port,
            "seconds": self._end - time.monotonic() - 1.0,
        }
        for n in nodes:
            assert n.line is not None
            n.line.send(go)
        return False

    def _read(self, line: _Line) -> None:
        try:
            data = line.socket.recv(1 << 16)
            *whole, line.buffer = (line.buffer + data).split(b"\n")
            for raw in whole:
                self._receive(line, json.loads(raw))
            if data and len(line.buffer) < (_KNOWN if line.node else _STRANGER):
                return
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass  # not one of our processes
        self._selector.unregister(line.socket)
        line.socket.close()
        if line.node is not None:
            line.node.line = None

    def _receive(self, line: _Line, message: dict[str, Any]) -> None:
        node = line.node
        if node is None:
            if not secrets.compare_digest(message["token"].encode(), self.token.encode()):
                raise ValueError("wrong token")
            node = self._nodes[message["host"]]
            if node.came:
                raise ValueError("a second process of this node")
            line.node, node.line, node.came, node.sent = node, line, True, message["time"]
            here, there = line.socket.getsockname()[0], line.socket.getpeername()[0]
            node.facts["address"] = self.address if here == there else there
            node.connected, node.answered = time.monotonic(), time.time()
            answer = {"requirements": asdict(self.requirements), "mark": self._mark.name}
            # Until the last node has come, all have checked, and all have measured.
            wait = self._began + self._starting + 2 * self._timeout - time.monotonic()
            line.send({**answer, "seconds": self._timeout - 1.0, "wait": wait})
        elif "facts" in message:
            node.facts |= message["facts"]
            node.faults = [NodeFault(node.host, **f) for f in message["faults"]]
            node.seconds, node.port = time.monotonic() - node.connected, message["port"]
            skew = skew_of(node.sent, node.answered, message["received"])
            node.facts |= {"skew_seconds": round(skew, 3), "seconds": round(node.seconds, 3)}
            if abs(skew) > self.requirements.skew:
                way = "ahead of" if skew > 0 else "behind"
                fake = " (a fake: FORESCALE_FAKE_CLOCK)" if "fake_clock" in node.facts else ""
                problem = f"its clock is {abs(skew):.1f} s {way} the first node's{fake}"
                todo = "set its clock, or exclude the node"
                node.faults.append(node.fault(problem, todo, "clock"))
        elif "broken" in message:
            node.broken, node.lost = NodeFault(node.host, **message["broken"]), message["lost"]
        else:
            node.pairs, node.reduce = message["pairs"], message["reduce"]

    def _report(
        self, seconds: float, over: bool, phase: Callable[[str], str | None]
    ) -> PreflightReport:
        nodes = list(self._nodes.values())
        faults = [f for n in nodes for f in n.faults]
        faults += self._silent(seconds, over, phase)
        notes: list[str] = []
        reduce = None
        if self._measuring:
            broken = []
            for n in (n for n in nodes if n.pairs is None):
                did = "had not measured" if n.line else "ended while it measured"
                problem = f"{did} the network after {seconds:.0f} s"
                todo = "see the job's log, or exclude the node"
                broken.append((n, n.broken or n.fault(problem, todo, "network")))
            # Blame nodes that failed themselves; if none, those without a report; else all.
            for failed_first in (lambda n: n.failed, lambda n: not n.broken, lambda n: True):
                if blamed := [f for n, f in broken if failed_first(n)]:
                    faults += blamed
                    break
            if not broken:
                reduce = min(n.reduce for n in nodes)
            faults += self._judge_rates(notes)
        elif self.requirements.reduce and len(nodes) > 1:
            notes.append("the network was not measured, because some nodes are missing or faulty")
        common, of_nodes = merged([f for f in faults if f.note], self._nodes)
        notes = [f.sentence for f in common + of_nodes] + notes
        facts, faults = {n.host: n.facts for n in nodes}, [f for f in faults if not f.note]
        return PreflightReport(faults, notes, facts, reduce, round(seconds, 3))

    def _silent(
        self, seconds: float, over: bool, phase: Callable[[str], str | None]
    ) -> list[NodeFault]:
        """Return faults of nodes that never connected, or connected and did not report."""
        nodes = self._nodes.values()
        others = max((n.seconds for n in nodes if n.seconds is not None), default=None)
        beside = f"; the others did in {others:.0f} s" if others is not None else ""
        faults = []
        for n in nodes:
            if n.seconds is not None or (over and n.line):  # it was interrupted by us
                continue
            todo = "see preflight.log of this attempt, or exclude the node"
            at = f" ({last})" if not n.came and (last := phase(n.host)) else ""
            if n.line:
                took = time.monotonic() - n.connected
                problem = f"did not finish its checks in {took:.0f} s{beside}"
                todo = "see preflight.log, raise slurm.check_time, or exclude the node"
            elif n.came:
                problem = f"its preflight process ended without a report{beside}"
            elif over:
                problem = f"its preflight process never connected{at}{beside}"
            else:
                problem = f"its preflight process did not start in {seconds:.0f} s{at}"
                todo = "see preflight.log, raise slurm.start_time, or exclude the node"
            faults.append(n.fault(problem, todo, "silent"))
        return faults

    def _judge_rates(self, notes: list[str]) -> list[NodeFault]:
        """Return faults of slow nodes, from the rates of all measured pairs."""
        pairs: dict[tuple[str, str], float] = {}
        for n in self._nodes.values():
            for other, rate in (n.pairs or {}).items():
                a, b = sorted((n.host, other))
                pairs[a, b] = min(rate, pairs.get((a, b), rate))
        best, least = best_pairs(pairs), self.requirements.min_gb_per_second or 0.0
        slow, slow_notes = slow_nodes(pairs, self.requirements.slow), []
        for host, rate in best.items():
            self._nodes[host].facts["gb_per_second"] = round(rate, 4)
            if host in slow:
                beside = f"; the median is {median_high(best.values()):.2f}"
            elif rate < least:
                beside = f", below the required {least:g}"
            else:
                continue
            problem = f"{rate:.2f} GB/s at best with its neighbours{beside}"
            todo = "exclude the node, or have its network checked"
            slow_notes.append(NodeFault(host, problem, todo, "slow"))
        if len(best) == 2 and slow_notes:  # the rate doesn't show which of the two is slow
            problem = f"{min(best.values()):.2f} GB/s between them, below {least:g}"
            notes.append(f"{' and '.join(best)}: {problem}; have their network checked")
            return []
        return slow_notes
