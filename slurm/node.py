"""The look at one node, `python -P -m forescale.slurm.node`: tells the supervisor what is wrong.

Invariant: it ends in time, whatever hangs. The main thread only waits: what may hang (storage, a
driver, a peer) is done by others, and where not even the main thread runs, faulthandler ends the
process. Exit code 0: it has said all it had to say, faults too; 1: it could not talk.
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

from forescale.slurm.findings import Wanted, rounds
from forescale.slurm.looks import Here, look
from forescale.slurm.preflight import ADDRESS

_CONNECT = 20.0  # seconds in which the supervisor must be reached
_ANSWER = 120.0  # and in which it must answer the first word
_REPEATS = 3
# In words of gloo, NCCL and the store: another is gone, or doesn't answer.
_LOST = re.compile(
    r"by peer|time(d )?out|refused|broken pipe|remote process|aborted", re.IGNORECASE
)
_LATE = 5.0  # seconds after its time until a process is ended hard


def interface_to(host: str) -> str | None:
    """The network interface by which `host` is reached, for gloo and NCCL. On that host itself, the
    one that holds its name's address, or, where that is the loopback (Debian's 127.0.1.1), the one
    of the default route. None for an address of the loopback, and where nothing is found."""
    if host == "localhost" or host.startswith("127.") or host == "::1":
        return None
    import psutil

    for target in (host, socket.gethostname(), "192.0.2.1"):  # the last is nobody's
        with suppress(OSError):
            family, kind, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as s:
                s.connect(address)  # sends nothing; chooses a route
                own = s.getsockname()[0].partition("%")[0]
            for name, addresses in psutil.net_if_addrs().items():
                if name != "lo" and any(a.address.partition("%")[0] == own for a in addresses):
                    return name
    return None


class Network:
    """Measures together with the other nodes. at: what it does just now."""

    ALONE = "importing torch"  # all else it does with others

    def __init__(self, here: Here, go: dict[str, Any], supervisor: str):
        self.here, self.go, self.supervisor = here, go, supervisor
        self.hosts: list[str] = go["hosts"]
        self.rank = self.hosts.index(here.host)
        self.at = self.ALONE

    def broken(self, how: str, lost: bool) -> dict[str, Any]:
        """The word for a measuring that failed. lost: for want of another, as far as we see."""
        what = f"measuring the network failed while {self.at}: {how}"
        fault = {"what": what, "todo": "have its network looked at, or exclude it"}
        return {"broken": {**fault, "kind": "network"}, "lost": lost}

    def word(self) -> dict[str, Any]:
        """Measure; what is to be said of it."""
        try:
            return self._measure()
        except Exception as e:
            first = re.sub(r"^\[.*?\] ", "", (str(e).strip() or repr(e)).splitlines()[0])
            return self.broken(first, lost=bool(_LOST.search(str(e))))

    def _measure(self) -> dict[str, Any]:
        name = interface_to(self.supervisor)
        if name:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # else: all that begin so
        import torch
        import torch.distributed as dist

        go, wanted = self.go, self.here.wanted
        os.environ |= {"MASTER_ADDR": go["address"], "MASTER_PORT": str(go["port"])}
        self.at = f"meeting the others at {go['address']}"
        device = torch.device("cuda:0" if wanted.cuda else "cpu")
        dist.init_process_group(
            "nccl" if wanted.cuda else "gloo",
            rank=self.rank,
            world_size=len(self.hosts),
            timeout=timedelta(seconds=max(1.0, go["seconds"] * 0.8)),
        )
        mine = torch.ones(max(1, wanted.reduce_bytes // 4), device=device)
        theirs = torch.empty_like(mine)
        self.at = "reducing over all nodes"
        # First of all: NCCL's pairs need a group in which all have met.
        reduce = self._rate(partial(dist.all_reduce, mine))
        pairs = {}
        for pair in (p for r in rounds(len(self.hosts)) for p in r if self.rank in p):
            other = sum(pair) - self.rank
            self.at = f"exchanging with {self.hosts[other]}"
            pairs[self.hosts[other]] = self._rate(partial(_exchange, mine, theirs, other))
        return {"pairs": pairs, "reduce": reduce}

    def _rate(self, work: Callable[[], object]) -> float:
        """GB/s of the best of a few, after one that connects."""
        import torch

        best = float("inf")
        for repeat in range(_REPEATS + 1):
            began = time.perf_counter()
            work()
            if self.here.wanted.cuda:
                torch.cuda.synchronize()
            if repeat:
                best = min(best, time.perf_counter() - began)
        return self.here.wanted.reduce_bytes / best / 1e9


def _exchange(mine: Any, theirs: Any, other: int) -> None:
    import torch.distributed as dist

    both = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, theirs, other)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


class Talk:
    """The line to the supervisor."""

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
        self._heard = b""

    def say(self, word: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(word).encode() + b"\n")

    def hear(self, seconds: float) -> dict[str, Any] | None:
        """Its next word; None where it has closed the line. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while b"\n" not in self._heard:
            self.socket.settimeout(max(0.01, end - time.monotonic()))
            data = self.socket.recv(1 << 16)
            if not data:
                return None
            self._heard += data
        line, self._heard = self._heard.split(b"\n", 1)
        return json.loads(line)


def clock(environment: Mapping[str, str], host: str) -> tuple[float, float | None]:
    """The time here; and by how much a test has moved it."""
    if environment.get("FORESCALE_FAKE_CLOCK_NODE") != host:
        return time.time(), None
    moved = float(environment.get("FORESCALE_FAKE_CLOCK", "0"))
    return time.time() + moved, moved


def serve(talk: Talk, token: str, host: str, supervisor: str) -> None:
    """All of a node's talk. Returns once it has said all that it was asked for; raises OSError
    where it could not."""
    sent, moved = clock(os.environ, host)
    talk.say({"token": token, "host": host, "time": sent})
    word = talk.hear(_ANSWER)
    received, _ = clock(os.environ, host)
    if word is None:
        raise ConnectionError("it did not take this process for one of its nodes")
    seconds = word["seconds"]
    end = time.monotonic() + seconds
    faulthandler.dump_traceback_later(seconds + _LATE, exit=True)
    here = Here(host, Wanted(**word["wanted"]), word["mark"])
    if moved is not None:
        here.facts["fake_clock"] = moved
    began = time.monotonic()
    faults = [{k: v for k, v in asdict(f).items() if k != "host"} for f in look(here, seconds / 2)]
    here.facts["look_seconds"] = round(time.monotonic() - began, 3)
    said = {"facts": here.facts, "faults": faults, "received": received, "port": _free_port()}
    talk.say(said)
    with suppress(OSError):  # by now it knows all that we have to say of ourselves
        if go := talk.hear(end - time.monotonic()):
            _take_part(talk, Network(here, go, supervisor), end)


def _take_part(talk: Talk, network: Network, end: float) -> None:
    """Measure, say what came of it, and stay until the supervisor closes the line: others may
    need this process until they are done, too."""
    words: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=lambda: words.put(network.word()), daemon=True).start()
    began, said = time.monotonic(), False
    while not select.select([talk.socket], [], [], 0.02)[0] and time.monotonic() < end + _LATE:
        if not said and not words.empty():
            talk.say(words.get())
            said = True
        elif not said and time.monotonic() > end:
            how = f"no end after {time.monotonic() - began:.0f} s"
            talk.say(network.broken(how, lost=network.at != Network.ALONE))
            said = True


def _free_port() -> int:
    """A port on which the nodes can meet here, if this is the first of them."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def main() -> int:
    faulthandler.register(signal.SIGUSR2)
    faulthandler.dump_traceback_later(_CONNECT + _ANSWER + _LATE, exit=True)
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    where, _, token = os.environ.get(ADDRESS, "").rpartition(":")
    address, _, port = where.rpartition(":")
    try:
        serve(Talk(address, int(port)), token, host, address)
    except (OSError, ValueError) as e:
        print(f"{host}: preflight: can't talk to {where or 'nobody'}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # neither a thread that hangs nor torch's own end may keep it
