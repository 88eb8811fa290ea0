"""A dataset behind a web server that misbehaves: the tokens of the local one, or a clear error."""

import random
from functools import partial
from pathlib import Path

import pytest
import torch

from forescale.data.dataset import Damaged, Dataset
from forescale.data.feed import Feed
from forescale.data.stream import StepShare, stream
from forescale.ground.errors import UserError
from forescale.remote.store import Store
from forescale.remote.transfer import Patience
from tests.trainer.data.small_dataset import write_dataset
from tests.trainer.data.test_stream import make_feed
from tests.trainer.remote.hostile_server import HostileServer
from tests.trainer.remote.remote_files import QUICK, sentence

L = 1024
BATCH = 32
STEPS = 40  # somewhat more than an epoch
FAULTS = ["reset", "half_then_reset", "close", "half", "half_unsized", "half_chunk", "short"]
FAULTS += ["empty", "garbage", "elsewhere", "500", "503:0"]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """Two shards of a bit more than two blocks, in members smaller than a block."""
    shards = [[50_000] * 11 + [7], [70_000] * 9]
    return write_dataset(tmp_path_factory.mktemp("far") / "d", shards, [[300]], member=150_000)


@pytest.fixture
def server(local):
    with HostileServer() as server:
        server.files |= {f"/d/{path.name}": path.read_bytes() for path in local.iterdir()}
        yield server


@pytest.fixture
def patient(monkeypatch):
    """Open datasets with a shorter patience than a cluster needs."""

    def with_patience(patience):
        monkeypatch.setattr("forescale.data.dataset.Store", partial(Store, patience=patience))

    with_patience(QUICK)
    return with_patience


def feed_of(dataset: Dataset) -> Feed:
    return make_feed({"data": dataset.split("train")}, L, 1, 2)


def batches(dataset: Dataset, rank=0, world=1, workers=1, steps=range(STEPS)) -> list:
    share = StepShare(BATCH, 4, rank, world)
    return list(stream(feed_of(dataset), share, steps, BATCH * steps.start, workers=workers))


def assert_equal(actual: list, want: list) -> None:
    assert len(actual) == len(want)
    for a, b in zip(actual, want, strict=True):
        assert (a.g0, a.g1, a.window_hash) == (b.g0, b.g1, b.window_hash)
        for x, y in zip(a.micro, b.micro, strict=True):
            assert torch.equal(x.tokens, y.tokens)
            assert torch.equal(x.targets, y.targets)


def requested(server, suffix=".tar") -> list[tuple[str, int]]:
    return [(a.path, a.start) for a in server.log if a.path.endswith(suffix)]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_cold_cache_and_a_warm_one_give_the_local_tokens(server, local, tmp_path, workers):
    want = batches(Dataset(local))
    assert_equal(batches(Dataset(f"{server.url}/d", tmp_path), workers=workers), want)
    assert len(requested(server)) == len(set(requested(server)))  # each block once
    server.log.clear()
    for name in server.files:
        if name.endswith((".tar", ".index.json")):
            server.always(name, 404)
    assert_equal(batches(Dataset(f"{server.url}/d/", tmp_path), workers=workers), want)
    assert sorted(a.path for a in server.log) == ["/d/files.json", *["/d/manifest.json"] * 2]


@pytest.mark.filterwarnings("ignore:.*trying again")
@pytest.mark.parametrize("seed", range(3))
def test_errors_of_every_kind_on_every_file_change_no_token(server, local, tmp_path, patient, seed):
    patient(Patience(tries=30, seconds=60, timeout=10, pause=0.001))
    rng = random.Random(seed)
    for name in server.files:
        server.next_time(name, *(rng.choice([*FAULTS, "well"]) for _ in range(25)))
    ranks = [Dataset(f"{server.url}/d", tmp_path) for _ in range(2)]
    for rank, dataset in enumerate(ranks):
        want = batches(Dataset(local), rank, 2)
        assert_equal(batches(dataset, rank, 2, workers=rank + 1), want)
    assert len(server.log) > 40


@pytest.mark.filterwarnings("ignore:.*trying again")
@pytest.mark.usefixtures("patient")
def test_a_lasting_error_ends_the_stream_and_names_file_and_server(server, tmp_path):
    feed = feed_of(Dataset(f"{server.url}/d", tmp_path))
    server.always("/d/train-000001.tar", "reset")
    with pytest.raises(UserError) as caught:
        list(stream(feed, StepShare(BATCH, 4), range(STEPS), 0, workers=2))
    text = sentence(caught)
    assert text.startswith(f"{server.url}/d/train-000001.tar: ")
    assert "the connection was interrupted (tried 4 times)" in text


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_a_server_that_keeps_hanging_ends_the_stream(server, tmp_path, patient):
    patient(Patience(tries=2, seconds=30, timeout=0.2, pause=0.001))
    server.always("/d/train-000000.tar", "hang")
    problem = r"/d/train-000000\.tar: .*the server sent nothing for 0.2 s"
    with pytest.raises(UserError, match=problem):
        batches(Dataset(f"{server.url}/d", tmp_path))


@pytest.mark.filterwarnings("ignore:.*trying again")
@pytest.mark.parametrize("name", ["manifest.json", "files.json", "train-000000.index.json"])
@pytest.mark.usefixtures("patient")
def test_an_unavailable_small_file_is_reported(server, tmp_path, name):
    server.always(f"/d/{name}", 500)
    with pytest.raises(UserError) as caught:
        batches(Dataset(f"{server.url}/d", tmp_path), workers=0)
    assert sentence(caught).startswith(f"{server.url}/d/{name}: the server answers 500")


@pytest.mark.usefixtures("patient")
def test_a_folder_without_a_dataset_is_reported(server, tmp_path):
    with pytest.raises(UserError, match=f"{server.url}/e: no such dataset"):
        Dataset(f"{server.url}/e", tmp_path)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("seed", range(3))
def test_damage_at_the_server_is_reported_and_not_cached(server, local, tmp_path, seed):
    """The same cache gives the correct tokens once the server does."""
    whole = server.files["/d/train-000000.tar"]
    at = random.Random(seed).randrange(100_000, 290_000)  # in the tokens of its first member
    server.files["/d/train-000000.tar"] = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
    with pytest.raises(Damaged, match="member 000000 is damaged: bytes") as caught:
        batches(Dataset(f"{server.url}/d", tmp_path))
    assert sentence(caught).startswith(f"{server.url}/d/train-000000.tar: ")
    server.files["/d/train-000000.tar"] = whole
    assert_equal(batches(Dataset(f"{server.url}/d", tmp_path)), batches(Dataset(local)))


@pytest.mark.usefixtures("patient")
def test_a_damaged_index_is_reported_and_not_cached(server, local, tmp_path):
    name = "/d/train-000001.index.json"
    whole = server.files[name]
    server.files[name] = whole.replace(b'"size"', b'"sise"', 1)
    with pytest.raises(Damaged, match="damaged: its sha256 differs from the manifest's") as caught:
        batches(Dataset(f"{server.url}/d", tmp_path))
    assert sentence(caught).startswith(server.url + name)
    server.files[name] = whole
    assert_equal(batches(Dataset(f"{server.url}/d", tmp_path)), batches(Dataset(local)))


@pytest.mark.usefixtures("patient")
def test_damage_in_the_cache_is_fixed_from_the_server(server, local, tmp_path):
    want = batches(Dataset(local))
    batches(Dataset(f"{server.url}/d", tmp_path))
    rng = random.Random(7)
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    assert_equal(batches(Dataset(f"{server.url}/d", tmp_path)), want)


@pytest.mark.usefixtures("patient")
def test_a_resumed_stream_fetches_only_what_its_step_needs(server, local, tmp_path):
    feed = feed_of(Dataset(f"{server.url}/d", tmp_path))
    g = 10**12
    [batch] = stream(feed, StepShare(2, 2), range(10**9, 10**9 + 1), g, workers=0)
    places = zip(*map(list, feed.mixture.places(g, g + 2)[1:]), strict=True)
    needed = {
        (f"/d/{feed.splits[0].shard_name(shard)}", at >> 20 << 20)
        for shard, start, length in places
        for offset, size in feed.splits[0].shard(shard).byte_ranges(start, length)
        for at in (offset, offset + size - 1)
    }
    assert set(requested(server)) == needed
    assert len(requested(server)) == len(needed)
    assert_equal(
        [batch], list(stream(feed_of(Dataset(local)), StepShare(2, 2), range(10**9, 10**9 + 1), g))
    )
