"""The benchmarks: python tests/benchmarks/run.py [NAME ...] [--rounds N] [--json FILE] [--toy]
[--mixers NAME,NAME]

Prints each result as it comes (A against B, the median ratio of pairs, its least and greatest, how
many) and writes all to a file, with what a reader needs to judge them. Timings decide no test.
"""

import argparse
import importlib
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from forescale.config.hardware import native_precision  # noqa: E402
from forescale.ground.storage import write_json  # noqa: E402
from forescale.run.start import versions  # noqa: E402
from tests.benchmarks.pairing import Result  # noqa: E402
from tests.benchmarks.processes import share_imports  # noqa: E402

NAMES = (
    "loop", "memory", "loss", "compile", "plain", "muon", "peer", "startup", "build", "stream",
    "save", "watch", "ranks", "status", "plan", "recovery", "next", "coordinates",
    "mixers", "generate", "serving", "invariant", "pipeline", "live", "repetitions", "gpu",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES) + "; all")
    parser.add_argument("--rounds", type=int, default=8, help="pairs a comparison (8)")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks.json"))
    toy = "so small that each takes seconds: shows that it runs, and its numbers mean nothing"
    parser.add_argument("--toy", action="store_true", help=toy)
    mixers = "of the benchmark mixers: NAME,NAME, or NAME+NAME for layers in turns (all mixers)"
    parser.add_argument("--mixers", type=lambda names: tuple(names.split(",")), help=mixers)
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if options.toy:
        share_imports()
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    # As the launcher sets them for a rank.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    report = new_report(options.rounds) | {"toy": options.toy}
    print(" | ".join(f"{k} {v}" for k, v in report["machine"].items()), flush=True)
    every = [name for name in NAMES if name != "gpu" or options.toy or torch.cuda.is_available()]
    for name in options.names or every:
        began, load = time.monotonic(), os.getloadavg()[0]
        bench = importlib.import_module(f"tests.benchmarks.bench_{name}")
        sizes = bench.TOY if options.toy else bench.REAL
        if name == "mixers" and options.mixers:
            sizes = replace(sizes, mixers=options.mixers)
        results = bench.measure(options.rounds, sizes)
        for result in results:
            print(result, flush=True)
        seconds, after = time.monotonic() - began, os.getloadavg()[0]
        print(f"    ({seconds:.0f} s; load average {load:.1f} before, {after:.1f} after)")
        add(report, name, results, seconds=round(seconds, 1), load_average=[load, after])
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, report)
    print(f"Written to {options.json}.")


def new_report(rounds: int) -> dict[str, Any]:
    """The machine and the versions, with no result yet."""
    machine = {
        "commit": _commit(),
        "processor": _processor(),
        "instructions": _instructions(),
        "precision": native_precision(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "system": platform.platform(),
    }
    packages = {**versions(), "transformers": version("transformers")}
    return {"machine": machine, "versions": packages, "rounds": rounds, "benchmarks": {}}


def add(report: dict[str, Any], name: str, results: list[Result], **facts: Any) -> None:
    report["benchmarks"][name] = {**facts, "results": [r.as_json() for r in results]}


def _commit() -> str:
    """The checkout's commit, with a + if its files are no longer those; unknown without git."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        git = subprocess.run(words, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def _processor() -> str:
    return _of_processor("model name") or platform.machine()


def _instructions() -> str:
    """The flags of the processor that decide how fast it multiplies, in which formats."""
    flags = (_of_processor("flags") or _of_processor("Features")).split()
    kinds = r"fma|f16c|avx2|avx512(f|bw|_bf16|_fp16|_vnni)|avx_vnni|amx_\w+|asimd|sve2?|bf16|i8mm"
    return " ".join(flag for flag in flags if re.fullmatch(kinds, flag)) or "unknown"


def _of_processor(field: str) -> str:
    """The first value of a field of /proc/cpuinfo; "" if it has none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    values = [line.partition(":")[2].strip() for line in lines if line.startswith(field)]
    return values[0] if values else ""


if __name__ == "__main__":
    main()
