"""What a real run of two ranks stores of the secrets in its data's address; where it listens."""

import socket
import time

import psutil
import pytest

from forescale.cli import main
from forescale.ground.storage import read_json
from forescale.run.directory import Run
from tests import launching
from tests.trainer.remote.hostile_server import HostileServer

pytestmark = pytest.mark.slow  # a real run of two ranks
LOGIN, SIGNATURE = "me:pA55-word", "sv=1&sig=s1gNature%2F"
KEYS = ("launch.processes=2", "train.tokens=null", "train.steps=100000", "validation.every=50000",
        "checkpoint.every=5 steps", "logging.wandb.enabled=true", "schedule.warmup=2")  # fmt: skip


@pytest.fixture(scope="module")
def stopped(dataset, tmp_path_factory):
    """(folder, output, listening addresses, requests) of a run that `stop` has ended."""
    folder, listening = tmp_path_factory.mktemp("secrets"), set()
    secrets = {"FORESCALE_SECRET_LOGIN": LOGIN, "FORESCALE_SECRET_SAS": SIGNATURE}
    with HostileServer() as server:
        server.files |= {f"/d/{p.name}": p.read_bytes() for p in dataset.iterdir()}
        host = server.url.partition("://")[2]
        address = f"http://$FORESCALE_SECRET_LOGIN@{host}/d?$FORESCALE_SECRET_SAS"
        variables = {**secrets, "WANDB_MODE": "offline", "FORESCALE_CACHE": str(folder / "cache")}
        process = launching.start(
            folder, "run.name=one", f"data.path={address}", *KEYS, cold=True, **variables
        )
        run = folder / "one"
        while not any(row["step"] >= 8 for row in launching.rows(run)):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        for child in psutil.Process(process.pid).children(recursive=True):
            connections = child.net_connections("inet")
            listening |= {c.laddr.ip for c in connections if c.status == "LISTEN"}
        assert main(["stop", str(run)]) == 0
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 75, output
    return folder, output, listening


def test_no_file_and_no_output_holds_a_secret(stopped):
    folder, output, _ = stopped
    words = [b"pA55-word", b"s1gNature"]
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert [p for p, data in files.items() if any(word in data for word in words)] == []
    assert not any(word.decode() in output for word in words)
    config = (folder / "one/config.yaml").read_text()
    assert "$FORESCALE_SECRET_LOGIN@" in config
    assert "$FORESCALE_SECRET_SAS" in read_json(Run(folder / "one").identity)["dataset"]["path"]


def test_only_the_owner_may_enter_the_run(stopped):
    assert (stopped[0] / "one").stat().st_mode & 0o777 == 0o700


def test_ranks_listen_on_the_loopback_alone(stopped):
    listening = stopped[2]
    assert listening
    assert all(socket.inet_aton(a)[0] == 127 for a in listening if ":" not in a)
    assert {a for a in listening if ":" in a} <= {"::1", "::ffff:127.0.0.1"}
