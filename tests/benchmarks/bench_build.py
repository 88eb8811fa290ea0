"""Building shards compared with a bare `tokenizers.encode_batch` over the same text with as many
workers; and, run as a script, the memory that a build of any size needs:

    python tests/benchmarks/bench_build.py --gigabytes 5 --workers 2 --folder /tmp

The text is Python source code in documents of about 4 kB, as JSON lines; the tokenizer is a BPE of
4,096 entries, trained before and given to both. The bare side has its texts in memory as Python
strings. A build reads its texts from disk two or three times, finds duplicates, shuffles, and
writes shards; if some text is held out it also runs compressors on it, which takes some seconds for
any size (it is left out above 16 MB of held-out text), a considerable part of such a short build.
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tokenizers import Tokenizer

from forescale.data.dataset import Dataset
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.corpus import PythonSource
from forescale.data.text.documents import ReadingReport, pieces
from forescale.data.text.files import Files
from forescale.data.tokenizer import train_bpe
from tests.benchmarks.pairing import Result
from tests.benchmarks.processes import Side, isolated, peak_memory


@dataclass(frozen=True)
class Sizes:
    """Bytes of text, entries of the tokenizer, worker processes."""

    text: int
    vocabulary: int
    workers: int


REAL = Sizes(44_000_000, 4096, workers=2)
TOY = Sizes(40_000, 300, workers=1)
DOCUMENT = 4_000  # bytes
FILES = 4
HELD_OUT = 0.01  # the default of `forescale shards`


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        isolated(prepare, Path(folder), sizes)
        workers = min(sizes.workers, len(os.sched_getaffinity(0)))
        return compare(max(1, rounds // 2), Path(folder), workers)  # each round takes seconds


def prepare(folder: Path, sizes: Sizes) -> None:
    """Write the text and the tokenizer."""
    texts = list(islice(documents(), sizes.text // DOCUMENT))
    (folder / "text").mkdir()
    for number in range(FILES):
        with open(folder / "text" / f"{number}.jsonl", "w") as f:
            f.writelines(json.dumps({"text": text}) + "\n" for text in texts[number::FILES])
    (folder / "tokenizer.json").write_text(train_bpe(texts[::4], sizes.vocabulary).to_str())


def documents() -> Iterator[str]:
    source = PythonSource()
    for unit in source.units():
        for document in source.read(unit, ReadingReport()):
            yield from pieces(document.text, DOCUMENT)


def compare(rounds: int, folder: Path, workers: int) -> list[Result]:
    """Compare tokens per second of whole builds, and of the phase that corresponds to the bare
    side."""
    sides = [lambda share=share: build(folder, workers, share) for share in (HELD_OUT, 0.0)]
    with Side(bare, folder, workers) as bare_side:
        turns = [(bare_side(), *(side() for side in sides)) for _ in range(rounds + 1)][1:]
    name, labels = f"building shards, {workers} worker{'s' * (workers > 1)}", ("ours", "bare")
    rows = {
        "as a user calls it": [(product[0], bare) for bare, product, _ in turns],
        "nothing held out": [(product[0], bare) for bare, _, product in turns],
        "nothing held out, the phase tokenise": [(product[1], bare) for bare, _, product in turns],
    }
    return [
        Result(f"{name}, {row}", "tokens/s", labels, pairs, "at least 0.8")
        for row, pairs in rows.items()
    ]


def bare(turn: Callable, folder: Path, workers: int) -> None:
    os.environ |= {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [d.text.decode() for d in read(Files([folder / "text"]))]
    turn()
    while True:
        began = time.perf_counter()
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        seconds = time.perf_counter() - began
        turn(sum(len(encoding.ids) for encoding in encodings) / seconds)


def read(source: Files) -> Iterator[Any]:
    for unit in source.units():
        yield from source.read(unit, ReadingReport())


def build(folder: Path, workers: int, held_out: float) -> tuple[float, float]:
    """Return tokens per second of a build, and of its phase "tokenise"."""
    output, ends = folder / "built", []

    def progress(phase: str, done: int, total: int | None, unit: str, *, tokens: int = 0) -> None:
        if done == total:
            ends.append((phase, time.perf_counter()))

    began = time.perf_counter()
    build_dataset(Files([folder / "text"]), output, config(folder, held_out), progress, workers)
    whole = time.perf_counter() - began
    at = [phase for phase, _ in ends].index("tokenise")
    splits = Dataset(output).manifest["splits"].values()
    tokens = sum(
        split["tokens"] - split["documents"] for split in splits
    )  # without end-of-text tokens
    shutil.rmtree(output)
    return tokens / whole, tokens / (ends[at][1] - ends[at - 1][1])


def config(folder: Path, held_out: float, tokenizer: str | None = None) -> BuildConfig:
    tokenizer = tokenizer or str(folder / "tokenizer.json")
    return BuildConfig(tokenizer=tokenizer, validation=held_out, shard_tokens=1 << 24)


def write_text(folder: Path, size: int) -> None:
    """Write `size` bytes of JSON lines: words by Zipf's law, documents of some bytes to 100 kB,
    every hundredth one twice, and one of about 10 MB."""
    rng = np.random.default_rng(0)
    words = sorted({w for text in islice(documents(), 500) for w in text.split() if len(w) < 20})
    rng.shuffle(words)
    total = number = 0
    while total < size:
        with open(folder / f"{number:04d}.jsonl", "w") as f:
            while f.tell() < 1 << 27 and total + f.tell() < size:
                count = int(np.clip(rng.lognormal(5, 1.2), 2, 15_000))
                if not number and not f.tell():
                    count = 1_500_000
                chosen = np.minimum(rng.zipf(1.3, count), len(words)) - 1
                text = " ".join([words[i] for i in chosen.tolist()])
                row = json.dumps({"text": text}) + "\n"
                f.write(row * (1 + (rng.random() < 0.01)))
            total += f.tell()
        number += 1


def watched(folder: Path, workers: int, tokenizer: str | None) -> dict[str, float]:
    """Run a build in this process; return seconds, and the maximum resident bytes of it and its
    workers."""
    highest: dict[int, int] = {}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            for child in psutil.Process().children():
                try:
                    status = Path(f"/proc/{child.pid}/status").read_text()
                    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
                except (OSError, IndexError):  # the process has just ended
                    continue
                highest[child.pid] = max(highest.get(child.pid, 0), peak)

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    build = config(folder, HELD_OUT, tokenizer)
    build_dataset(Files([folder / "text"]), folder / "built", build, workers=workers)
    seconds = time.perf_counter() - began
    stop.set()
    return {"seconds": seconds, "parent": peak_memory(), "worker": max(highest.values(), default=0)}


def main() -> None:
    parser = argparse.ArgumentParser(description="The memory that a build needs.")
    parser.add_argument("--gigabytes", type=float, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="folder with free space for four times --gigabytes"
    )
    parser.add_argument("--tokenizer", help="bytes, or a path; default: a BPE of 4,096 entries")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        isolated(prepare, folder, REAL)
        shutil.rmtree(folder / "text")
        (folder / "text").mkdir()
        isolated(write_text, folder / "text", int(options.gigabytes * 1e9))
        seconds = isolated(watched, folder, options.workers, options.tokenizer)
        manifest = Dataset(folder / "built").manifest
    read_mb = sum(s["read_bytes"] for s in manifest["report"]["sources"]) / 1e6
    print(
        f"{read_mb:,.0f} MB, {manifest['corpus']['documents']:,} documents, "
        f"{manifest['report']['duplicates']['documents']:,} duplicates, {options.workers} workers: "
        f"{seconds['seconds']:,.0f} s ({read_mb / seconds['seconds']:.1f} MB/s); most resident: "
        f"parent {seconds['parent'] / 1e6:,.0f} MB, a worker {seconds['worker'] / 1e6:,.0f} MB"
    )


if __name__ == "__main__":
    main()
