"""The server: uvicorn with a limit of connections and deadlines for slow clients.

Invariant: a connection ends if it doesn't bring a whole request, or take the next bytes of an
answer, in 30 seconds. Where there are too many, the one that has brought its request for longest
ends; a new one is refused only where all others wait for answers.
"""

import asyncio
import ipaddress
import json
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from forescale.serving.app import Service, app_of
from forescale.serving.request import Refused

_DEADLINE = 30.0  # seconds for a request to arrive, and for the next bytes of an answer to leave
_MAX_HEADERS = 32 << 10  # bytes
_READ = 16 << 10  # bytes that are taken from a connection at once
_STOP = 5.0  # seconds that clients have to take their last bytes when the server stops


class Server(uvicorn.Server):
    """Serves a service at an address. connections: the most at once; each: the most from one
    address. Raises OSError if it can't listen there."""

    def __init__(self, host: str, port: int, service: Service, connections: int, each: int):
        self.service = service
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.create_server((host, port), family=family, backlog=64)

        class LimitedConnection(Connection):
            limit, client_limit = connections, each

        config = uvicorn.Config(
            app_of(service),
            http=LimitedConnection,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=_MAX_HEADERS,
            timeout_graceful_shutdown=int(_STOP),
        )
        super().__init__(config)

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port at which the server listens."""
        return self.socket.getsockname()[:2]

    def serve_forever(self) -> None:
        """Answer requests until `should_exit`, or a signal, whose own handler runs at the end."""
        self.run(sockets=[self.socket])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let no client wait for an answer that doesn't come any more."""
        self.service.scheduler.close()
        await super().shutdown(sockets)


class Connection(H11Protocol):
    """A connection with limits: uvicorn calls these methods as bytes come and go."""

    limit: int  # of connections at once
    client_limit: int  # of those from one address

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # asyncio's 256 KiB at once hold more headers than are allowed, which h11 wouldn't see, and
        # so many tiny chunks that it takes half a second for them.
        transport.max_size = _READ
        crowd = [c for c in self.connections if isinstance(c, Connection)]
        crowd = [c for c in crowd if not c.transport.is_closing()]
        same = [c for c in crowd if _network(c.client) == _network(self.client)]
        if len(same) > self.client_limit:
            crowd = same
        elif len(crowd) <= self.limit:
            crowd = []
        slow = {c._timers["bringing"].when(): c for c in crowd if "bringing" in c._timers}
        if slow:  # so clients that bring bytes slowly, however many, keep nobody out
            slow[min(slow)].transport.abort()
        elif crowd:
            raw = json.dumps(Refused(503, "Too many connections.", code="busy").body()).encode()
            head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            head += f"Connection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
            transport.write(head.encode() + raw)
            transport.close()
        self._watch_arrival()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_arrival()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_arrival()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer("taking")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_timer("taking")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for name in [*self._timers]:
            self._end_timer(name)

    def _watch_arrival(self) -> None:
        """Run the timer while a request, its headers or its body, is incomplete."""
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._start_timer("bringing")
        else:
            self._end_timer("bringing")

    def _start_timer(self, name: str) -> None:
        """End the connection in _DEADLINE seconds, unless this timer runs, or is ended before."""
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(_DEADLINE, self.transport.abort)

    def _end_timer(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()


def _network(client: tuple[str, int] | None) -> str:
    """Return a client's address; of IPv6 the network of a site, which has as many as it likes."""
    host = client[0] if client else ""
    return str(ipaddress.ip_network((host, 64), strict=False)) if ":" in host else host
