"""Fixtures for all: a small real dataset, of this project's own source."""

import gc
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings

from tests.matrix import FULL

GPU_WORKERS = 4

# Nothing that is imported and collected is garbage; a collector that looks through it again and
# again takes a fifth of the time. It begins when all is collected.
gc.disable()

# A shell that starts us in the background has this signal ignored, and so would all that we start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What a shell, a job of SLURM or another tool may have set, and the project or its libraries read:
# no test means it. COLUMNS is pytest-xdist's, and would make pages as wide as the terminal. The
# variables of tests/README.md stay.
_FOREIGN = (
    *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TERM", "RANK", "LOCAL_", "WORLD_SIZE"),
    *("GROUP_", "ROLE_", "NODE_RANK", "MASTER_", "TORCHELASTIC_", "SLURM", "SBATCH_", "SRUN_"),
    *("PMI", "OMPI_", "CUDA_", "NCCL_", "DS_", "DEEPSPEED_", "ACCELERATE_", "WANDB_", "AWS_"),
    *("S3_", "FSSPEC_", "HF_", "TRANSFORMERS_", "HYDRA_", "XDG_", "HTTP_", "HTTPS_", "ALL_PROXY"),
    *("http_", "https_", "all_proxy", "FORESCALE_"),
    "PYTHONDONTWRITEBYTECODE",  # each of hundreds of processes would compile what it imports
)
_OF_TESTS = {
    *("CACHE", "MATRIX", "DRILL", "KILLS", "REPLICATES", "WORDS", "DATA", "CLUSTER", "BROWSER"),
    *("NEEDS_BROWSER", "NEEDS_CLUSTER", "JOB_KILLS", "FAULTS", "GPUS"),
}
# Tests compute on the CPU; those of tests/gpu use the GPUs that were visible to this process.
os.environ.setdefault("FORESCALE_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
for _name in [name for name in os.environ if name.startswith(_FOREIGN)]:
    if _name.removeprefix("FORESCALE_") not in _OF_TESTS:
        del os.environ[_name]
sys.dont_write_bytecode = False
if any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
for _name in ("FORESCALE_DATA", "FORESCALE_CACHE"):  # tests run in a directory of their own
    if _name in os.environ:
        os.environ[_name] = str(Path(os.environ[_name]).absolute())

# One thread: the sums of a product depend on how many share it, and beside other workers more
# threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes is the machine's affair.
# The fast tests are to take four minutes; FORESCALE_MATRIX=full draws as many as hypothesis would.
settings.register_profile("ours", deadline=None, max_examples=100 if FULL else 60)
settings.load_profile("ours")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker more than there are cores: tests that wait for a process leave theirs idle. But few
    that share a GPU."""
    workers = len(os.sched_getaffinity(0)) + 1
    return min(workers, GPU_WORKERS) if config.option.markexpr == "gpu" else workers


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import the tests of the GPU kit alone, where no others are to run."""
    is_other = collection_path.is_file() and collection_path.parent.name != "gpu"
    return True if config.option.markexpr == "gpu" and is_other else None


def pytest_collection(session: pytest.Session) -> None:
    """Import the files of tests, each worker from another start: what pytest makes of their asserts
    is on disk when the next one comes there, where otherwise each worker would do all."""
    if session.config.option.markexpr == "gpu" or "PYTEST_XDIST_WORKER" not in os.environ:
        return
    number, count = (os.environ[f"PYTEST_XDIST_WORKER{name}"] for name in ("", "_COUNT"))
    places = [Path(word.partition("::")[0]).absolute() for word in session.config.args]
    files = sorted(file for place in places for file in place.rglob("test_*.py"))
    start = len(files) * int(number.removeprefix("gw")) // int(count)
    for file in [*files[start:], *files[:start]]:
        name = ".".join(file.relative_to(session.config.rootpath).with_suffix("").parts)
        with suppress(Exception, pytest.skip.Exception):  # said when it is collected
            importlib.import_module(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the longest tests first: one that began last would run alone for minutes.

    A test that may take long has a timeout mark that says so.
    """
    limits: dict[Path, float] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        limits[item.path] = max(limits.get(item.path, 0), mark.args[0] if mark else 0)
    items.sort(key=lambda item: -limits[item.path])  # stable: the rest stays in its order


def pytest_collection_finish() -> None:
    """Look for no garbage in what is imported and collected: it took a tenth of the time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def workplace(tmp_path_factory) -> Iterator[Path]:
    """An empty current directory: no test sees the runs of a user, and none leaves a file in it."""
    before, here = Path.cwd(), tmp_path_factory.mktemp("workplace")
    os.chdir(here)
    yield here
    os.chdir(before)
    assert not [*here.iterdir()], "a test wrote into the current directory instead of tmp_path"


def built(source: Path, output: Path) -> Path:
    """Build a dataset of Python source: a BPE of 512 entries, two splits.

    Each run evaluates the held-out one whole at its end: it is 2 % of the text, a tenth of a small
    run's time. So that it is never a few words, short files are left out.
    """
    from forescale.data.prepare.builder import BuildConfig, build_dataset
    from forescale.data.text.files import Files

    config = BuildConfig(vocab_size=512, validation=0.02, shard_tokens=30_000, member_tokens=10_000)
    files = sorted(path for path in source.rglob("*.py") if path.stat().st_size > 4000)
    with pytest.MonkeyPatch.context() as patch:  # a small corpus gives more, up to a tenth
        patch.setattr("forescale.data.prepare.selection._DOCUMENTS", 1)
        patch.setattr("forescale.data.prepare.selection._BYTES", 0)
        return build_dataset(Files(files), output, config)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Some 170,000 tokens of Python."""
    source = Path(__file__).parents[1] / "trainer/data"
    return built(source, tmp_path_factory.mktemp("data") / "source")


@pytest.fixture(scope="session")
def large_dataset(tmp_path_factory) -> Path:
    """Some 900,000 tokens of Python, for runs that are to read none twice."""
    return built(Path(__file__).parents[1] / "trainer", tmp_path_factory.mktemp("data") / "large")
