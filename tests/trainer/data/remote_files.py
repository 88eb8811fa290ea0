"""Files for tests of remote reading: their bytes, a server that has them, and how they are read."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

from forescale.data.remote.transfer import Patience
from tests.trainer.data.hostile_server import HostileServer

QUICK = Patience(tries=4, seconds=30, timeout=10, pause=0.01)
HASTY = Patience(tries=2, seconds=30, timeout=0.2, pause=0.01)  # only where the server hangs
DATA = random.Random(1).randbytes(3_000_000)  # three blocks, the last one shorter
SMALL = DATA[:5000]


@contextmanager
def serving() -> Iterator[HostileServer]:
    """A server with some files in /d."""
    with HostileServer() as server:
        server.files |= {"/d/a.tar": DATA, "/d/small": SMALL, "/d/empty": b""}
        yield server


def read(file, start=0, stop=None) -> bytes:
    """The bytes [start, stop) of an open File."""
    data = bytearray((file.size if stop is None else stop) - start)
    file.read_at(start, memoryview(data))
    return bytes(data)


def sentence(caught) -> str:
    """What a caught UserError says, which is one sentence."""
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text
