"""Datasets and inputs in a bucket, at a real S3 server (moto's) in a process of its own.

Google's gs:// goes the same way through fsspec, but nothing here can speak its protocol: what
gcsfs raises, and whether its `generation` tells versions apart, is untested.
"""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from forescale.data.dataset import Dataset
from forescale.ground.errors import UserError
from forescale.remote.buckets import Folder
from forescale.remote.listing import list_files, open_input
from forescale.remote.store import Store
from forescale.remote.transfer import Missing
from tests.trainer.checkpoint.test_outer import NAMES, decided, sent
from tests.trainer.checkpoint.test_outer import store as outer_store
from tests.trainer.data.small_dataset import write_dataset
from tests.trainer.remote.remote_files import DATA, QUICK, SMALL, read, sentence

# The first makes an environment for the server.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[4]
SERVES = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """The server has its own environment: its boto3 and the aiobotocore of s3fs need different
    versions of botocore, and pip searches for many minutes for a version that suits both."""
    shared = tmp_path_factory.getbasetemp().parent  # by the workers of one session
    root = shared / "moto"
    python = root / "bin" / "python"
    with FileLock(shared / "moto.lock"):
        if not (root / "made").exists():
            # Not moto[server], which needs what emulates all other services, too.
            needs = ["moto[s3]>=5", "flask", "flask-cors"]
            pip = [sys.executable, "-m", "pip", "--python", python]
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True)
            subprocess.run([*pip, "install", "-q", "--no-compile", *needs], check=True)
            (root / "made").touch()
    quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([python, "-c", SERVES], text=True, **quiet) as process:
        port = process.stdout.readline().strip()
        yield f"http://127.0.0.1:{port}"
        process.kill()


@pytest.fixture(autouse=True)
def bucket(endpoint, monkeypatch):
    """An empty bucket, with its address in the environment, as in a user's shell."""
    s3fs = pytest.importorskip("s3fs")
    for name, value in environment(endpoint).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # cached instances keep the old environment
    fs = s3fs.S3FileSystem(endpoint_url=endpoint)
    if fs.exists("books"):
        fs.rm("books", recursive=True)
    fs.mkdir("books")
    yield fs
    s3fs.S3FileSystem.clear_instance_cache()


def environment(endpoint: str) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret"}
    nowhere = {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    region = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    return {"AWS_ENDPOINT_URL": endpoint, **keys, **nowhere, **region}


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-P", "-m", "forescale", *words], capture_output=True, text=True
    )


@pytest.fixture
def put(bucket, tmp_path):
    """Write a dataset on this machine and the same in the bucket."""
    local = write_dataset(tmp_path / "d", [[50_000] * 11 + [7], [70_000] * 9], member=150_000)
    bucket.put(str(local), "books/d", recursive=True)
    return local


def test_a_dataset_in_a_bucket_reads_the_same(put, tmp_path):
    for _ in range(2):  # a cold cache and a warm one
        far, near = (Dataset(p, tmp_path / "cache") for p in ("s3://books/d", put))
        assert far.identity == near.identity
        for shard, count in enumerate(near.split("train").shard_tokens):
            want = near.split("train").read(shard, 0, count)
            assert np.array_equal(far.split("train").read(shard, 0, count), want)


@pytest.mark.parametrize("size", [100, len(DATA) - 1, len(DATA) + 1])
def test_a_file_of_another_size_is_reported(bucket, tmp_path, size):
    bucket.pipe("books/a", (DATA + b"x")[:size])
    file = Store("s3://books", tmp_path, 1 << 26, QUICK).open("a", len(DATA), "v1")
    with pytest.raises(UserError, match=f"s3://books/a: has {size:,} bytes on the server"):
        read(file)


def test_a_changed_file_is_fetched_again(bucket, tmp_path):
    """Without a known checksum, the bucket's own name for a version is the cache key."""
    for content in (SMALL, SMALL[::-1], SMALL):
        bucket.pipe("books/a", content)
        store = Store("s3://books", tmp_path, 1 << 26, QUICK)
        assert read(store.open("a")) == content


def test_inputs_are_listed_and_read(bucket):
    for name in ("b.txt", "a.txt", "c.md", "x/d.txt", "x/y/e.txt"):
        bucket.pipe(f"books/in/{name}", name.encode())

    def names(pattern):
        return [name.removeprefix("s3://books/in/") for name, _ in list_files(pattern, QUICK)]

    assert names("s3://books/in") == ["a.txt", "b.txt", "c.md", "x/d.txt", "x/y/e.txt"]
    assert names("s3://books/in/") == names("s3://books/in")
    assert names("s3://books/in/*.txt") == ["a.txt", "b.txt"]
    assert names("s3://books/in/**/*.txt") == ["a.txt", "b.txt", "x/d.txt", "x/y/e.txt"]
    assert list_files("s3://books/in/c.md") == [("s3://books/in/c.md", 4)]
    bucket.pipe("books/in/large", DATA)
    with closing(open_input("s3://books/in/large", QUICK)) as f:
        assert f.read() == DATA
        f.seek(2_000_000)
        assert f.read(10) == DATA[2_000_000:2_000_010]


@pytest.mark.parametrize("url", ["s3://books/nothing", "s3://no-bucket/x", "s3://books/*.txt"])
def test_missing_inputs_are_reported(url):
    with pytest.raises(UserError, match=r"has no files|doesn't exist") as caught:
        list_files(url, QUICK)
    assert sentence(caught).startswith(url)


def test_a_missing_dataset_is_reported(tmp_path):
    for url in ("s3://books/nothing", "s3://no-bucket/d"):
        with pytest.raises(UserError, match=f"{url}: no such dataset"):
            Dataset(url, tmp_path)
    with pytest.raises(Missing):
        Store("s3://books", tmp_path, 1 << 26, QUICK).read("nothing")


def test_missing_credentials_are_reported(put, bucket, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    bucket.clear_instance_cache()
    acts = (lambda: Dataset("s3://books/d", tmp_path / "cache"), lambda: list_files("s3://books/d"))
    for act in acts:
        with pytest.raises(UserError, match=r"s3://books/d.*: access denied") as caught:
            act()
        assert "set your credentials in the environment" in sentence(caught)


def test_a_build_from_a_bucket_equals_one_from_a_folder(bucket, tmp_path):
    """Runs the command `forescale shards s3://books/text`."""
    (tmp_path / "text" / "more").mkdir(parents=True)
    for i in range(20):
        folder = tmp_path / "text" / ("more" if i % 3 else "")
        (folder / f"{i}.txt").write_text(f"document {i} " * 200)
    bucket.put(str(tmp_path / "text"), "books/text", recursive=True)
    near, far = tmp_path / "near", tmp_path / "far"
    for source, output in ((str(tmp_path / "text"), near), ("s3://books/text", far)):
        done = command("shards", source, f"output={output}", "vocab_size=300", "workers=2")
        assert done.returncode == 0, done.stderr
    assert Dataset(far).identity == Dataset(near).identity
    missing = command("shards", "s3://books/nothing", f"output={tmp_path / 'none'}")
    assert missing.returncode == 2
    assert "s3://books/nothing: has no files" in missing.stderr


def test_of_members_that_decide_at_once_in_a_bucket_one_does(bucket, tmp_path):
    stores = [outer_store(tmp_path, name, store="s3://books/run") for name in NAMES]
    for one in stores:
        one.join({"every": 3})
        sent(one)
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(decided, stores)
    assert [*first.members] == NAMES
    assert others == [first, first]
    assert not Folder("s3://books/run", QUICK).create("run.json", b"another")
    shutil.rmtree(stores[0].local)
    for record in first.members.values():
        stores[0].fetch_table(3, record)
        assert stores[0].fetch(3, record, (0, 1)) == 1
    for one in stores:
        one.prune(6)
    assert not any("rank-" in name for name in bucket.find("books/run"))
