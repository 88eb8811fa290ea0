"""A real HTTP server on loopback that serves files from memory and misbehaves on request."""

import hashlib
import socket
import struct
import sys
import threading
from collections import defaultdict
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Request(NamedTuple):
    """One request; stop is exclusive, None if no range was requested."""

    path: str
    start: int
    stop: int | None
    connection: tuple[str, int]


class HostileServer:
    """A context manager. files: the files to serve, by path ("/a.tar").

    `next_time(path, *faults)`: one fault for each of the next requests; `always(path, fault)`: for
    all requests after those. A fault is an HTTP status, or the name of a `do_` method of the
    handler below, with an argument after a colon. `asked`: all requests so far, in order.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.log: list[Request] = []
        self.sent: dict[str, int] = defaultdict(int)  # bytes of bodies, by path
        self.gate = threading.Event()  # event that `wait` waits for
        self.arrived = threading.Semaphore(0)  # released by every request
        self._once: dict[str, list[str]] = defaultdict(list)
        self._always: dict[str, str] = {}
        self._lock = threading.Lock()

    def next_time(self, path: str, *faults: str | int) -> None:
        self._once[path] += map(str, faults)

    def always(self, path: str, fault: str | int) -> None:
        self._always[path] = str(fault)

    def requests(self, path: str) -> list[tuple[int, int | None]]:
        return [(a.start, a.stop) for a in self.log if a.path == path]

    def fault_of(self, path: str) -> str:
        with self._lock:
            waiting = self._once[path]
            return waiting.pop(0) if waiting else self._always.get(path, "well")

    def __enter__(self) -> "HostileServer":
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hostile = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.closing = threading.Event()
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self.closing.set()
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()


@lru_cache(16)
def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    request_queue_size = 64

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), OSError):  # an interrupted connection, as intended
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.hostile: HostileServer = self.server.hostile  # type: ignore[attr-defined]
        self.path = self.path.partition("?")[0]
        data = self.hostile.files.get(self.path)
        if data is None and self.path.endswith("/"):
            data = self.page()
        self.data = data or b""
        self.start, self.stop, stop = 0, len(self.data), None
        if spread := self.headers.get("Range"):
            first, _, last = spread.removeprefix("bytes=").partition("-")
            self.start = int(first)
            stop = int(last) + 1 if last else None
            self.stop = min(len(self.data), stop or len(self.data))
        self.hostile.log.append(Request(self.path, self.start, stop, self.client_address))
        self.hostile.arrived.release()
        fault, _, argument = self.hostile.fault_of(self.path).partition(":")
        self.body = self.data[self.start : self.stop]
        if fault.isdigit():
            self.answer(b"", int(fault), **({"Retry-After": argument} if argument else {}))
        elif data is None:
            self.answer(b"", 404)
        elif spread and self.start >= len(self.data) and fault == "well":
            self.answer(b"", 416, **{"Content-Range": f"bytes */{len(self.data)}"})
        else:
            getattr(self, f"do_{fault}")(*filter(None, [argument]))

    def answer(self, body: bytes, status: int, length: int | None = None, **headers: str) -> None:
        """Send head and body. length: the Content-Length, -1 for none."""
        self.hostile.sent[self.path] += len(body)
        self.send_response(status)
        if length != -1:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def ranged(self, body: bytes, length: int | None = None, **headers: str) -> None:
        """Answer the requested range, with only this much of its body."""
        whole = "Range" not in self.headers
        spread = f"bytes {self.start}-{self.stop - 1}/{len(self.data)}"
        tag = self.hostile.etags.get(self.path) or _tag(self.data)
        headers = {"ETag": tag} | ({} if whole else {"Content-Range": spread}) | headers
        length = len(self.body) if length is None else length
        self.answer(body, 200 if whole else 206, length, **headers)

    def page(self) -> bytes:
        """Send a folder's list of links, as servers do."""
        below = {p[len(self.path) :] for p in self.hostile.files if p.startswith(self.path)}
        names = {n.partition("/")[0] + "/" * ("/" in n) for n in below}
        links = "".join(f'<a href="{n}">{n}</a> ' for n in sorted(names))
        return f'<h1>Index</h1><a href="../">up</a> <a href="?C=M">by date</a> {links}'.encode()

    def half(self) -> bytes:
        return self.body[: (len(self.body) + 1) // 2]

    def do_reset(self) -> None:
        """Reset the connection instead of closing it."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # connection.close() would wait for the file objects of the connection.
        socket.close(self.connection.detach())
        self.close_connection = True

    def do_close(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def do_hang(self) -> None:
        self.hostile.closing.wait(60)
        self.close_connection = True

    def do_well(self) -> None:
        self.ranged(self.body)

    def do_wait(self, status: str = "") -> None:
        self.hostile.gate.wait(60)
        if status:
            self.answer(b"", int(status))
        else:
            self.ranged(self.body)

    def do_half_then_wait(self) -> None:
        self.ranged(self.half())
        self.hostile.gate.wait(60)
        self.wfile.write(self.body[len(self.half()) :])

    def do_half_then_reset(self) -> None:
        self.ranged(self.half())
        self.do_reset()

    def do_half(self) -> None:
        self.ranged(self.half())
        self.do_close()

    def do_half_unsized(self) -> None:
        self.ranged(self.half(), length=-1, Connection="close")
        self.do_close()

    def do_half_chunk(self) -> None:
        half = self.half()
        chunk = f"{len(self.body):x}\r\n".encode() + half
        self.ranged(chunk, length=-1, **{"Transfer-Encoding": "chunked"})
        self.do_close()

    def do_empty(self) -> None:
        self.ranged(b"", length=0)

    def do_short(self) -> None:
        """Send less than requested, with a correct Content-Range."""
        self.stop = self.start + max(1, len(self.body) // 2)
        self.ranged(self.body[: self.stop - self.start], length=self.stop - self.start)

    def do_half_then_hang(self) -> None:
        self.ranged(self.half())
        self.do_hang()

    def do_trickle(self) -> None:
        """Send byte after byte, each in time, without end."""
        self.ranged(b"")
        for byte in self.body:
            if self.hostile.closing.wait(0.02):
                break
            self.wfile.write(bytes([byte]))

    def do_garbage(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        self.do_close()

    def do_whole(self) -> None:
        """Answer like a server without ranges."""
        self.answer(self.data, 200)

    def do_whole_unsized(self) -> None:
        self.answer(self.data, 200, length=-1, Connection="close")
        self.do_close()

    def do_elsewhere(self) -> None:
        """Send other bytes than those requested."""
        first = (self.start + 1) % max(1, len(self.data) - len(self.body))
        spread = f"bytes {first}-{first + len(self.body) - 1}/{len(self.data)}"
        self.ranged(self.data[first : first + len(self.body)], **{"Content-Range": spread})

    def do_nowhere(self) -> None:
        self.answer(self.body, 206)

    def do_redirect(self, to: str) -> None:
        self.answer(b"", 302, Location=to)
