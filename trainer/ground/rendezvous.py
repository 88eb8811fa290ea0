"""Where the processes of a run meet: the store of torch.distributed, and its network interface.

Invariant: a store of ours listens on one address only. Ranks of one machine meet at the loopback
address, which no other machine reaches; ranks of several nodes meet at an address of the first
node. torch itself would listen on all interfaces, and nothing in its protocol asks who connects.
"""

import errno
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"
_ROUTE = "192.0.2.1"  # reserved for documentation: the default route leads there


_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST, _TRIES = 10_000, 100  # below 10,000 are the ports of many services


def free_port() -> int:
    """Return a TCP port of this host that nobody listens on at this moment. Rank 0 listens there
    seconds later, when it has imported torch. A port that the system itself chooses may by then
    belong to any connection that was opened meanwhile: so it is one of those that outgoing
    connections don't get, where there are any."""
    below = int(_OUTGOING.read_text().split()[0]) if _OUTGOING.exists() else 0
    for _ in range(_TRIES if below > _LOWEST else 0):
        port = _LOWEST + secrets.randbelow(below - _LOWEST)
        with socket.socket() as s, suppress(OSError):  # someone listens there: try another
            s.bind(("", port))
            return port
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def is_loopback(host: str) -> bool:
    """Return True for a name or address that means "this machine" on every machine."""
    return host in ("localhost", "::1") or host.startswith("127.")


def own_address(host: str) -> str | None:
    """Return the address of this machine on the route to `host`. On `host` itself: the address of
    its name; if that is the loopback (Debian's 127.0.1.1), the one of the default route. None for a
    loopback address, or if nothing is found."""
    if is_loopback(host):
        return None
    for target in (host, socket.gethostname(), _ROUTE):
        with suppress(OSError):
            family, kind, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as s:
                s.connect(address)  # sends nothing; chooses a route
                address_here = s.getsockname()[0].partition("%")[0]
            if not is_loopback(address_here):
                return address_here
    return None


def interface_to(host: str) -> str | None:
    """Return the network interface with `own_address(host)`; None if there is none."""
    address = own_address(host)
    return _interface_of(address) if address else None


def use_interface_to(host: str) -> None:
    """Bind the sockets of gloo and NCCL to `interface_to(host)`, before either is used, where the
    environment names no other."""
    if name := interface_to(host):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # as in use_loopback


def _interface_of(address: str) -> str | None:
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        fits = name != "lo" or is_loopback(address)
        if fits and any(a.address.partition("%")[0] == address for a in addresses):
            return name
    return None


def use_loopback() -> None:
    """Bind the sockets of gloo and NCCL to the loopback interface; before either is used."""
    if name := _interface_of(LOOPBACK):
        os.environ["GLOO_SOCKET_IFNAME"] = name
        # With =, NCCL uses this interface alone, not all whose names begin with it.
        os.environ["NCCL_SOCKET_IFNAME"] = f"={name}"


def meeting_address(host: str) -> str:
    """Return the address that MASTER_ADDR stands for, the same machine from everywhere: a name that
    its own machine resolves to the loopback becomes the address by which the others reach it."""
    if is_loopback(host):
        return LOOPBACK if host == "localhost" else host
    try:
        resolved = socket.getaddrinfo(host, 9, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:  # a machine may not know its own name
        return own_address(host) or host
    address = str(resolved).partition("%")[0]
    return (own_address(host) or address) if is_loopback(address) else address


def open_store(host: str, port: int, rank: int, size: int, seconds: float) -> Any:
    """Return the torch.distributed store of `size` ranks, which rank 0 serves at `host`. seconds:
    how long a rank waits for another. Raises OSError if rank 0 can't listen there."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    address = meeting_address(host)
    listening = _listen(address, port, own_address(host)) if rank == 0 else None
    return TCPStore(
        address,
        port,
        size,
        is_master=rank == 0,
        timeout=timedelta(seconds=seconds),
        master_listen_fd=listening,
        use_libuv=True,
    )


def _listen(address: str, port: int, fallback: str | None) -> int:
    """Return the descriptor of a socket that listens at this address alone; the store closes it.
    fallback: this machine's address, if `address` is that of a gateway that passes connections on.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((address, port))
        except OSError as e:
            if e.errno != errno.EADDRNOTAVAIL or fallback is None:
                raise
            return _listen(fallback, port, None)
        s.listen(4096)
        return s.detach()
