"""Checks what this machine has for training, and how to fix what it lacks.

Invariant: each finding is one line. A fault prevents `forescale train` from running here; a note
makes it slower or smaller. Changes nothing, needs no network, imports no deepspeed.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from forescale.config.sections.data import CorpusConfig
from forescale.ground.errors import UserError
from forescale.monitor.gpus import TorchGpus, try_gpus

# As in pyproject.toml, for a checkout that isn't installed.
SUPPORTED = {"torch": ">=2.10", "deepspeed": ">=0.19.8,<0.20", "accelerate": ">=1.10,<2"}
PYTHON = (3, 11)
_GIB = 2**30
_RUN_NEEDS = _GIB // 2  # a few checkpoints of the default model, its logs
_CACHE_NEEDS = _GIB // 8  # the embedded corpus, while it is built
_MEMORY_NEEDS = 2 * _GIB  # the default run, one rank
_BUILD = 600  # longest time of a build of DeepSpeed's kernels, in seconds


class Finding(NamedTuple):
    """One line: what was checked, what was found, and how to fix it."""

    level: Literal["ok", "note", "fault"]
    name: str
    text: str
    fix: str = ""


def examine(root: Path, data: CorpusConfig) -> Iterator[Finding]:
    """Yield all findings, in the order of a fresh installation. root: where runs will be stored;
    data: what they will train on."""
    yield python()
    for package, supported in SUPPORTED.items():
        yield package_version(package, supported)
    if importlib.util.find_spec("torch"):
        yield graphics()
        yield compiler()
    yield ninja()
    yield build_lock(extensions_directory())
    yield cores()
    yield memory()
    yield disk("run.root", root, _RUN_NEEDS)
    yield disk("data.cache", data.cache_directory, _CACHE_NEEDS)
    yield corpus(data)
    yield wandb()


def python() -> Finding:
    """Check the version of Python."""
    text = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < PYTHON:
        return Finding("fault", "python", text, "use Python 3.11 or newer")
    return Finding("ok", "python", text)


def package_version(package: str, supported: str) -> Finding:
    """Check that a package is installed in a supported version."""
    from packaging.specifiers import SpecifierSet

    fix = f"pip install '{package}{supported}'"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding("fault", package, "not installed", fix)
    if not SpecifierSet(supported).contains(version, prereleases=True):
        return Finding("fault", package, f"{version}, not {supported}", fix)
    return Finding("ok", package, f"{version} (supported: {supported})")


def graphics() -> Finding:
    """Check that torch can use the GPUs, if there are any, and try each of them."""
    import torch

    if torch.cuda.is_available():
        gpus = TorchGpus()
        names = ", ".join(f"{n} {name}" for name, n in Counter(gpus.names).items())
        text = f"{names}; {'ROCm' if torch.version.hip else f'CUDA {torch.version.cuda}'}"
        trial = try_gpus(gpus)
        if trial.problems:
            fix = "end other processes on it (nvidia-smi), or have it looked at"
            return Finding("note", "gpu", f"{text}; {'; '.join(trial.problems)}", fix)
        return Finding("ok", "gpu", f"{text}; {trial.text}")
    if any(Path("/proc/driver/nvidia/gpus").glob("*")):
        why = "is built without CUDA" if torch.version.cuda is None else "can't start CUDA"
        text = f"present, but torch {torch.__version__} {why}"
        fix = "install a build of torch for this driver's CUDA (see pytorch.org)"
        return Finding("fault", "gpu", text, fix)
    return Finding("note", "gpu", "none; training on the CPU", "fine for small models")


def compiler() -> Finding:
    """Check that torch.compile can compile."""
    from forescale.engine.compilation import compiler_missing

    missing = compiler_missing()
    if missing is None:
        return Finding("ok", "compiler", "torch.compile can compile")
    text = f"this machine lacks {missing}: training takes about twice as long"
    return Finding("note", "compiler", text, "apt-get install g++ python3-dev, or the like")


def ninja() -> Finding:
    """Check that ninja is there for builds of DeepSpeed's kernels."""
    if shutil.which("ninja"):
        return Finding("ok", "ninja", str(shutil.which("ninja")))
    if importlib.util.find_spec("ninja"):
        text = "installed, but not on the PATH; builds of DeepSpeed's own kernels need it there"
        return Finding("note", "ninja", text, f'export PATH="{Path(sys.executable).parent}:$PATH"')
    return Finding("note", "ninja", "not installed", "pip install ninja, for offload to the CPU")


def extensions_directory() -> Path:
    """Return where torch and DeepSpeed build their extensions."""
    directory = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(directory or "~/.cache/torch_extensions").expanduser()


def build_lock(root: Path) -> Finding:
    """Check that no killed build left a lock, for which the next build would wait for ever."""
    locks = [p for depth in ("*/lock", "*/*/lock") for p in root.glob(depth)]
    if not locks:
        return Finding("ok", "builds", f"no lock in {root}")
    oldest = min(locks, key=lambda p: p.stat().st_mtime)
    age = max(0.0, time.time() - oldest.stat().st_mtime)
    text = f"a lock of {age / 60:.0f} minutes at {oldest}"
    if age < _BUILD:
        return Finding("note", "builds", text, "a build is running or was just killed")
    return Finding("fault", "builds", f"{text}, left by a killed build", f"rm {oldest}")


def cores() -> Finding:
    """Check that all cores may be used."""
    mine, all_ = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    limit = f"; OMP_NUM_THREADS={threads}" if threads else ""
    if threads and threads.isdigit() and int(threads) < mine:
        fix = "unset OMP_NUM_THREADS to train on all cores"
        return Finding("note", "cores", f"{mine} of {all_}{limit}", fix)
    return Finding("ok", "cores", f"{mine} of {all_}{limit}")


def memory() -> Finding:
    """Check that there is memory for a small run."""
    import psutil

    facts = psutil.virtual_memory()
    text = f"{facts.available / _GIB:.1f} of {facts.total / _GIB:.1f} GiB free"
    if facts.available < _MEMORY_NEEDS:
        return Finding("note", "memory", text, "end other programs; a rank takes about 1 GiB")
    return Finding("ok", "memory", text)


def disk(key: str, path: Path, needs: int) -> Finding:
    """Check that a directory can be written or made, with room for `needs` bytes."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        return Finding("fault", key, f"{there} is a file", f"choose another {key}")
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding("fault", key, f"{there} is not writable", f"choose another {key}")
    free = shutil.disk_usage(there).free
    text = f"{free / _GIB:.1f} GiB free at {path}"
    if free < needs:
        fix = f"free some space (about {needs / _GIB:.2f} GiB), or choose another {key}"
        return Finding("fault", key, text, fix)
    return Finding("ok", key, text)


def corpus(data: CorpusConfig) -> Finding:
    """Check the data that `forescale train` will read."""
    from forescale.data.dataset import Dataset
    from forescale.data.prepare.corpus import PythonSource, embedded_path

    try:
        if data.path is None:
            path = embedded_path(PythonSource(), data.cache_directory)
            if not path.exists():
                text = f"the embedded one is not prepared yet in {path.parent}"
                return Finding(
                    "note", "corpus", text, "forescale train prepares it, in about a minute"
                )
        else:
            path = Path(data.path).expanduser()
        dataset = Dataset(path)
    except UserError as e:
        return Finding("fault", "corpus", f"{e.where}: {e.problem}", e.todo)
    tokens = dataset.split("train").num_tokens
    text = f"{path} ({tokens:,} tokens to train on, corpus hash {dataset.corpus_hash[:16]})"
    return Finding("ok", "corpus", text)


def wandb() -> Finding:
    """Check whether Weights & Biases can be used."""
    if not importlib.util.find_spec("wandb"):
        return Finding("note", "wandb", "not installed", "pip install wandb, if you need it")
    from forescale.config.sections.trackers import has_account

    version = importlib.metadata.version("wandb")
    if has_account():
        return Finding("ok", "wandb", f"{version}, logged in; switch it on with logging=wandb")
    text = f"{version}, not logged in; logging=wandb writes offline"
    return Finding("note", "wandb", text, "run wandb login to send them online")
