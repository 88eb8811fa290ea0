"""Files for tests of remote reading: their bytes, a server for them, and how to read them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

from forescale.remote.transfer import Patience
from tests.trainer.remote.hostile_server import HostileServer

QUICK = Patience(tries=4, seconds=30, timeout=10, pause=0.01)
DATA = random.Random(1).randbytes(3_000_000)  # three blocks, the last one shorter
SMALL = DATA[:5000]


@contextmanager
def serving() -> Iterator[HostileServer]:
    """Yield a server with some files in /d."""
    with HostileServer() as server:
        server.files |= {"/d/a.tar": DATA, "/d/small": SMALL, "/d/empty": b""}
        yield server


def read(file, start=0, stop=None) -> bytes:
    """Return the bytes [start, stop) of an open File."""
    data = bytearray((file.size if stop is None else stop) - start)
    file.read_at(start, memoryview(data))
    return bytes(data)


def sentence(caught) -> str:
    """Return the message of a caught UserError, after checking that it is one line."""
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text
