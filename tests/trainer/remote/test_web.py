"""Files at a web server that misbehaves: after every error the correct bytes, or a clear error."""

import socket
import threading

import pytest

from forescale.ground.errors import UserError
from forescale.remote.store import Store
from forescale.remote.transfer import Missing, Patience, Unreachable
from tests.trainer.remote.remote_files import DATA, QUICK, SMALL, read, sentence


@pytest.fixture
def opened(server, tmp_path):
    """Open a file of /d with a Patience."""

    def open_one(name="a.tar", patience=QUICK, size=None):
        store = Store(f"{server.url}/d", tmp_path / "cache", 1 << 26, patience)
        return store.open(name, len(server.files[f"/d/{name}"]) if size is None else size, "v1")

    return open_one


# -- errors that are retried


ONCE = (
    "reset half_then_reset close half half_unsized half_chunk short empty garbage elsewhere nowhere"
)
IN_A_ROW = [
    *(["elsewhere"], ["nowhere"], [500]),
    *([502, 503, 504], ["503:0", "429:0"], ["429:Wed, 21 Oct 2015 07:28:00 GMT"], ["503:soon"]),
    ["half", "reset", 500, "half_unsized", "close", "elsewhere", "half_then_reset"],
]


@pytest.mark.parametrize("faults", [*([f] for f in ONCE.split()), *IN_A_ROW], ids=str)
@pytest.mark.filterwarnings("ignore:.*trying again")
def test_a_temporary_error_is_retried(server, opened, faults):
    server.next_time("/d/a.tar", *faults)
    assert read(opened(), 100, 2_500_000) == DATA[100:2_500_000]
    assert len(server.requests("/d/a.tar")) == 3 + len(faults)


@pytest.mark.parametrize("fault", ["hang", "half_then_hang"])
def test_a_server_that_hangs_once_is_retried(server, opened, fault):
    server.next_time("/d/small", fault)
    patience = Patience(tries=50, seconds=60, timeout=0.2, pause=0.01)
    assert read(opened("small", patience)) == SMALL


@pytest.mark.parametrize("fault", ["half", "half_unsized", "half_then_reset", "short"])
def test_received_bytes_are_kept_between_tries(server, opened, fault):
    """Each answer is cut in half: because received bytes are kept, a block takes log2 of its size
    requests."""
    server.always("/d/small", fault)
    assert read(opened("small", Patience(tries=2, seconds=30, timeout=10, pause=0.001))) == SMALL
    starts = [start for start, _ in server.requests("/d/small")]
    assert starts == sorted(set(starts))
    assert len(starts) <= 14


def test_a_small_file_is_read_from_a_server_without_ranges(server, opened):
    server.always("/d/a.tar", "whole")
    assert read(opened(), 1_500_000, 2_500_000) == DATA[1_500_000:2_500_000]


def test_redirects_are_followed(server, opened):
    server.files["/other"] = DATA
    server.always("/d/a.tar", "redirect:/other")
    assert read(opened(), 1_000_000, 1_200_000) == DATA[1_000_000:1_200_000]


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_the_network_fails_in_the_middle_of_a_run(server, opened):
    """A server that was stopped and comes back at the same address."""
    file = opened(patience=Patience(tries=50, seconds=60, timeout=10, pause=0.01))
    assert read(file, 0, 10) == DATA[:10]
    for a in server.log:
        assert a.stop == 1 << 20
    server.always("/d/a.tar", "reset")
    result = []
    reader = threading.Thread(target=lambda: result.append(read(file)))
    reader.start()
    for _ in range(4):
        server.arrived.acquire(timeout=30)
    server.always("/d/a.tar", "well")
    reader.join(30)
    assert result == [DATA]


# -- errors that are raised


@pytest.mark.parametrize(
    ("fault", "problem", "kind"),
    [
        (401, "access denied (the server answers 401 Unauthorized)", UserError),
        (403, "access denied (the server answers 403 Forbidden)", UserError),
        (404, "doesn't exist (the server answers 404 Not Found)", Missing),
        (410, "doesn't exist", Missing),
        (400, "the server answers 400 Bad Request", UserError),
        (416, "the server answers 416", UserError),
    ],
)
def test_errors_that_no_retry_can_fix_are_raised_at_once(server, opened, fault, problem, kind):
    server.always("/d/a.tar", fault)
    with pytest.raises(kind) as caught:
        read(opened())
    text = sentence(caught)
    assert text.startswith(f"{server.url}/d/a.tar: {problem}")
    assert "check the address" in text
    assert len(server.log) == 1


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("reset", "the connection was interrupted"),
        ("close", "the server closes the connection without an answer"),
        ("empty", "the answer is 1,048,576 bytes too short"),
        ("garbage", "the answer isn't HTTP"),
        ("elsewhere", "requested the bytes from 0 on, the server sends 'bytes 1-"),
        ("nowhere", "requested the bytes from 0 on, the server sends ''"),
        (500, "the server answers 500 Internal Server Error"),
        ("503:0", "the server answers 503 Service Unavailable"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*trying again")
def test_lasting_errors_are_raised_with_the_number_of_tries(server, opened, fault, problem):
    server.always("/d/a.tar", fault)
    with pytest.raises(Unreachable) as caught:
        read(opened())
    text = sentence(caught)
    assert text.startswith(f"{server.url}/d/a.tar: {problem}")
    assert "(tried 4 times); check the address" in text
    assert len(server.log) == 4


def test_a_very_slow_server_is_reported(server, opened):
    """Each byte comes in time, but the file never ends."""
    server.always("/d/a.tar", "trickle")
    with pytest.raises(Unreachable, match=r"too slow: [1-9]"):
        read(opened(patience=Patience(tries=4, seconds=0.3, timeout=10, pause=0.01)))


def test_a_requested_wait_is_respected(server, opened, monkeypatch):
    slept = []
    monkeypatch.setattr("forescale.remote.transfer.time.sleep", slept.append)
    server.next_time("/d/a.tar", "503:7")
    assert read(opened(), 0, 10) == DATA[:10]
    assert slept == [7.0]


def test_a_requested_wait_that_is_too_long_raises_at_once(server, opened, monkeypatch):
    monkeypatch.setattr("forescale.remote.transfer.time.sleep", pytest.fail)
    server.always("/d/a.tar", "429:3600")
    with pytest.raises(Unreachable, match=r"429 .* and asks to wait 3,600 s \(tried once\)"):
        read(opened())


def test_pauses_double_and_differ_between_ranks(server, opened, monkeypatch):
    slept = []
    monkeypatch.setattr("forescale.remote.transfer.time.sleep", slept.append)
    server.always("/d/a.tar", 500)
    with (
        pytest.warns(RuntimeWarning, match="a.tar: the server answers 500"),
        pytest.raises(Unreachable),
    ):
        read(opened(patience=Patience(tries=6, seconds=1000, timeout=10, pause=1)))
    assert len(slept) == 5
    for i, pause in enumerate(slept):
        assert 2**i / 2 <= pause <= 2**i
    assert slept != [2**i for i in range(5)]


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_a_missing_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(Unreachable, match=r"the server refuses the connection \(tried 4 times\)"):
        Store(url, tmp_path, patience=QUICK).read("manifest.json")


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_an_unknown_host_name(tmp_path, monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    problem = r"http://nowhere.invalid/a: the name of the server can't"
    with pytest.raises(Unreachable, match=problem):
        Store("http://nowhere.invalid", tmp_path, patience=QUICK).read("a")


@pytest.mark.parametrize("url", ["http:///d", "http://host:port/"])
def test_invalid_addresses(tmp_path, url):
    with pytest.raises(UserError, match="isn't a valid address") as caught:
        Store(url, tmp_path, patience=QUICK).read("a")
    sentence(caught)


def test_redirects_without_end(server, opened):
    server.always("/d/a.tar", "redirect:/d/a.tar")
    with pytest.raises(UserError, match="redirects without end"):
        read(opened())


def test_a_large_file_at_a_server_without_ranges_is_refused(server, opened):
    server.files["/d/large"] = bytes(9 << 20)
    server.always("/d/large", "whole")
    with pytest.raises(UserError, match="the server ignores ranges"):
        read(opened("large"))
    server.always("/d/large", "whole_unsized")
    with pytest.raises(UserError, match="the server ignores ranges"):
        read(opened("large"))


def test_a_file_that_changes_between_two_requests_is_reported(server, opened):
    file = opened()
    read(file, 0, 10)
    server.files["/d/a.tar"] = DATA[::-1]
    with pytest.raises(UserError, match="changed on the server between two requests"):
        read(file)


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 100])
def test_a_file_of_another_size_than_in_the_manifest_is_reported(server, opened, size):
    server.files["/d/a.tar"] = (DATA + b"x")[:size]
    problem = f"a.tar: has {size:,} bytes on the server, expected 3,000,000"
    with pytest.raises(UserError, match=problem):
        read(opened(size=len(DATA)))
