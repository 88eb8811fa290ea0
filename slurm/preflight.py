"""Before ranks start: hears what every node says of itself, and says what is wrong with which.

    the supervisor (Preflight)             a node (node.py); each word is a line of JSON
                                       <-  token, host, time
    wanted, mark, seconds              ->
                                       <-  facts, faults, received (its clock), port (a free one)
    go, or the connection is closed    ->
                                       <-  pairs, reduce; or fault, lost

Invariant: only who knows the token is heard; every host ends with all it had to say or with a
fault in its name; nobody is waited for beyond the timeout. Imports no torch.
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

from forescale.slurm.findings import Fault, Report, Wanted, best_pairs, merged, skew_of, slow_nodes

__all__ = ["ADDRESS", "Fault", "Preflight", "Report", "Wanted"]

ADDRESS = "FORESCALE_PREFLIGHT"  # host:port:token of the supervisor
_GRACE = 2.0  # seconds that others have to speak once a node has failed in measuring
_STRANGER, _KNOWN = 1 << 12, 1 << 24  # bytes of a line


@dataclass
class _Node:
    """What a host has said so far. seconds: until it had looked around."""

    host: str
    line: "_Line | None" = None  # while it is connected
    came: bool = False
    sent: float = 0.0
    answered: float = 0.0
    seconds: float | None = None
    port: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    pairs: dict[str, float] | None = None
    reduce: float = 0.0
    broken: Fault | None = None  # while it measured
    lost: bool = False  # `broken` says no more than that another doesn't answer

    def fault(self, what: str, todo: str, kind: str) -> Fault:
        return Fault(self.host, what, todo, kind)

    @property
    def failed(self) -> bool:
        """Whether it, and none of those that wait for it, broke off the measuring."""
        return self.pairs is None and (not self.lost if self.broken else self.line is None)


@dataclass
class _Line:
    socket: socket.socket
    node: _Node | None = None  # None: a stranger
    heard: bytes = b""

    def say(self, word: dict[str, Any]) -> None:
        with suppress(OSError):  # that it is gone is found by reading
            self.socket.sendall(json.dumps(word).encode() + b"\n")


class Preflight:
    """A server for the nodes' processes, on a port of all interfaces. hosts: the nodes, as SLURM
    calls them; address: of this host, as the others reach it."""

    def __init__(self, wanted: Wanted, hosts: list[str], address: str):
        self.wanted, self.hosts, self.address = wanted, list(hosts), address
        self.token = secrets.token_hex(16)
        self._nodes = {host: _Node(host) for host in hosts}
        self._server = _listen(len(hosts))
        self.port: int = self._server.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ, None)
        self._measuring = False
        self._mark = Path(wanted.run) / f".preflight-{self.token[:8]}"
        try:  # a node that doesn't see it has another directory of that name
            self._mark.touch()
        except OSError:
            self._mark = Path()

    @property
    def environment(self) -> dict[str, str]:
        """What the nodes' processes need beside SLURM's own variables."""
        return {ADDRESS: f"{self.address}:{self.port}:{self.token}"}

    def collect(self, is_over: Callable[[], bool], timeout: float) -> Report:
        """Hear the nodes until all have said all, the step that runs them is over, or the time is.
        Closes the server, and the nodes' processes end with it: call it once."""
        began = self._began = time.monotonic()
        self._end = began + timeout
        failed, over = 0.0, False
        try:
            while time.monotonic() < self._end and not self._have_all():
                heard = self._listen_for(0.1)
                if over and not heard:
                    break
                over = over or is_over()  # what was said before is still on its way
                if self._measuring and any(n.failed for n in self._nodes.values()):
                    failed = failed or time.monotonic()
                    if time.monotonic() - failed > _GRACE:
                        break
            return self._report(time.monotonic() - began, over)
        finally:
            self.close()

    def close(self) -> None:
        if self._server.fileno() < 0:
            return
        for key in list(self._selector.get_map().values()):
            (key.data.socket if key.data else self._server).close()
        self._selector.close()
        if self._mark.name:
            with suppress(OSError):
                self._mark.unlink()

    def _have_all(self) -> bool:
        """Whether nobody has more to say. Lets them measure once all have looked around."""
        nodes = self._nodes.values()
        if self._measuring:
            return all(n.pairs is not None or n.broken or not n.line for n in nodes)
        if any(n.seconds is None and (n.line or not n.came) for n in nodes):
            return False
        well = all(n.line and all(f.note for f in n.faults) for n in nodes)
        if not (self.wanted.reduce and len(nodes) > 1 and well):
            return True
        self._measuring = True
        first = self._nodes[self.hosts[0]]
        go = {
            "hosts": self.hosts,
            "address": first.facts["address"],
            "port": first.port,
            "seconds": self._end - time.monotonic() - 1.0,
        }
        for n in nodes:
            assert n.line is not None
            n.line.say(go)
        return False

    def _listen_for(self, seconds: float) -> bool:
        """Take what comes; whether something did."""
        events = self._selector.select(seconds)
        for key, _ in events:
            if key.data is not None:
                self._read(key.data)
                continue
            with suppress(OSError):
                taken = self._server.accept()[0]
                taken.settimeout(5.0)
                self._selector.register(taken, selectors.EVENT_READ, _Line(taken))
        return bool(events)

    def _read(self, line: _Line) -> None:
        try:
            data = line.socket.recv(1 << 16)
            *whole, line.heard = (line.heard + data).split(b"\n")
            for raw in whole:
                self._hear(line, json.loads(raw))
            if data and len(line.heard) < (_KNOWN if line.node else _STRANGER):
                return
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass  # whoever speaks otherwise is nobody of ours
        self._selector.unregister(line.socket)
        line.socket.close()
        if line.node is not None:
            line.node.line = None

    def _hear(self, line: _Line, word: dict[str, Any]) -> None:
        node = line.node
        if node is None:
            if not secrets.compare_digest(word["token"].encode(), self.token.encode()):
                raise ValueError("a stranger")
            node = self._nodes[word["host"]]
            if node.came:
                raise ValueError("a second process of a node")
            line.node, node.line, node.came, node.sent = node, line, True, word["time"]
            here, there = line.socket.getsockname()[0], line.socket.getpeername()[0]
            node.facts["address"] = self.address if here == there else _plain(there)
            node.answered = time.time()
            mark, seconds = self._mark.name, self._end - time.monotonic() - 1.0
            line.say({"wanted": asdict(self.wanted), "mark": mark, "seconds": seconds})
        elif "facts" in word:
            node.facts |= word["facts"]
            node.faults = [Fault(node.host, **f) for f in word["faults"]]
            node.seconds, node.port = time.monotonic() - self._began, word["port"]
            self._judge_clock(node, word["received"])
        elif "broken" in word:
            node.broken, node.lost = Fault(node.host, **word["broken"]), word["lost"]
        else:
            node.pairs, node.reduce = word["pairs"], word["reduce"]

    def _judge_clock(self, node: _Node, received: float) -> None:
        skew = skew_of(node.sent, node.answered, received)
        node.facts |= {"skew_seconds": round(skew, 3), "seconds": round(node.seconds or 0.0, 3)}
        if abs(skew) > self.wanted.skew:
            way = "ahead of" if skew > 0 else "behind"
            fake = " (a fake: FORESCALE_FAKE_CLOCK)" if "fake_clock" in node.facts else ""
            what = f"its clock is {abs(skew):.1f} s {way} the first node's{fake}"
            node.faults.append(node.fault(what, "have its clock set, or exclude it", "clock"))

    def _report(self, seconds: float, over: bool) -> Report:
        nodes = list(self._nodes.values())
        faults = [f for n in nodes for f in n.faults]
        faults += self._silent(seconds, over)
        notes: list[str] = []
        reduce = None
        if self._measuring:
            broken = [f for n in nodes if (f := self._broken(n, seconds)) is not None]
            # The others wait for one that failed; or for one that has not even seen its time pass.
            for guilty in (lambda n: n.failed, lambda n: not n.broken, lambda n: True):
                if blamed := [f for n, f in broken if guilty(n)]:
                    faults += blamed
                    break
            if not broken:
                reduce = min(n.reduce for n in nodes)
            faults += self._judge_rates(notes)
        elif self.wanted.reduce and len(nodes) > 1:
            notes.append("the network was not measured: not all nodes are there and well")
        common, own = merged([f for f in faults if f.note], self._nodes)
        notes = [f.sentence for f in common + own] + notes
        facts = {n.host: n.facts for n in nodes}
        return Report([f for f in faults if not f.note], notes, facts, reduce, round(seconds, 3))

    def _silent(self, seconds: float, over: bool) -> list[Fault]:
        """Faults of those that came and didn't go on, or never came."""
        nodes = self._nodes.values()
        others = max((n.seconds for n in nodes if n.seconds is not None), default=None)
        beside = f"; the others did in {others:.0f} s" if others is not None else ""
        todo = "see the job's log for a reason, or exclude the node"
        found = []
        for n in nodes:
            if n.seconds is not None or (over and n.line):  # it was not let finish
                continue
            what = f"did not answer in {seconds:.0f} s{beside}"
            if n.came and n.line is None:
                what = f"its process of the preflight ended without a word{beside}"
            elif over:
                what = f"its process of the preflight never came{beside}"
            found.append(n.fault(what, todo, "silent"))
        return found

    def _broken(self, n: _Node, seconds: float) -> tuple[_Node, Fault] | None:
        if n.pairs is not None:
            return None
        if n.broken is None:
            did = "had not measured" if n.line else "ended while it measured"
            what = f"{did} the network after {seconds:.0f} s"
            return n, n.fault(what, "see the job's log, or exclude the node", "network")
        return n, n.broken

    def _judge_rates(self, notes: list[str]) -> list[Fault]:
        """Faults of slow nodes, by the rates of all pairs that were measured."""
        pairs: dict[tuple[str, str], float] = {}
        for n in self._nodes.values():
            for other, rate in (n.pairs or {}).items():
                a, b = sorted((n.host, other))
                pairs[a, b] = min(rate, pairs.get((a, b), rate))
        best, least = best_pairs(pairs), self.wanted.min_gb_per_second or 0.0
        slow, found = slow_nodes(pairs, self.wanted.slow), []
        for host, rate in best.items():
            self._nodes[host].facts["gb_per_second"] = round(rate, 4)
            if host in slow:
                beside = f"; the median is {median_high(best.values()):.2f}"
            elif rate < least:
                beside = f", below the {least:g} that are wanted"
            else:
                continue
            what = f"{rate:.2f} GB/s at best with its neighbours{beside}"
            todo = "exclude it, or have its network looked at"
            found.append(Fault(host, what, todo, "slow"))
        if len(best) == 2 and found:  # which of the two it is nobody can tell
            what = f"{min(best.values()):.2f} GB/s between them, below {least:g}"
            notes.append(f"{' and '.join(best)}: {what}; have their network looked at")
            return []
        return found


def _listen(hosts: int) -> socket.socket:
    """A server on a port of its own; with as many files as it needs for all hosts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hosts + 256:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
        )
    return socket.create_server(("", 0), backlog=4096)


def _plain(address: str) -> str:
    """An IPv4 address that a socket for both kinds wrote as one of IPv6."""
    return address.removeprefix("::ffff:")
