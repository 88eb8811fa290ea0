"""Where ranks meet: one address, and the right one."""

import socket

import pytest

from forescale.ground import rendezvous
from forescale.ground.rendezvous import free_port, meeting_address, open_store


def test_a_store_of_local_ranks_refuses_all_other_addresses():
    """127.0.0.2 reaches what listens on all interfaces, as any address of the machine does."""
    port = free_port()
    store = open_store("localhost", port, 0, 1, 20.0)
    store.set("here", "yes")
    socket.create_connection(("127.0.0.1", port), 5).close()
    others = {"127.0.0.2", rendezvous.own_address(socket.gethostname()) or "127.0.0.3"}
    for address in others:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, port), 5)


def test_a_free_port_is_none_that_another_connection_may_get_before_rank_0_listens(
    monkeypatch, tmp_path
):
    """Outgoing connections get ports from 32768 on, unless this machine has another range."""
    ports = tmp_path / "range"
    monkeypatch.setattr(rendezvous, "_OUTGOING", ports)
    ports.write_text("32768\t60999\n")
    assert all(10_000 <= free_port() < 32_768 for _ in range(200))
    ports.write_text("10002\t60999\n")
    with socket.socket() as taken:
        taken.bind(("", 10_000))
        assert {free_port() for _ in range(30)} == {10_001}
    ports.write_text("1024\t65535\n")
    assert free_port() >= 1024


def test_ranks_of_several_nodes_meet_at_the_address_of_the_node(monkeypatch):
    """Debian's own name of a machine is 127.0.1.1 there, and another address from everywhere."""
    address = "192.0.2.7"
    monkeypatch.setattr(rendezvous, "own_address", lambda host: address)
    known = {"n1": "127.0.1.1", "n2": "192.0.2.9"}
    find = lambda host, *_, **__: [(None, None, None, "", (known[host], 9))]  # noqa: E731
    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", find)
    assert (meeting_address("n1"), meeting_address("n2")) == (address, "192.0.2.9")
    assert (meeting_address("localhost"), meeting_address("::1")) == ("127.0.0.1", "::1")


def test_behind_a_gateway_a_store_listens_at_the_machines_own_address(monkeypatch):
    """In Kubernetes MASTER_ADDR may be the address of a service, which no machine has."""
    monkeypatch.setattr(rendezvous, "own_address", lambda host: "127.0.0.1")
    port = free_port()
    listening = rendezvous._listen("203.0.113.1", port, "127.0.0.1")
    socket.create_connection(("127.0.0.1", port), 5).close()
    socket.close(listening)
