"""The stream's int64 batches, including order and checks, compared with three alternatives: a raw
numpy memmap read in random order, plain webdataset, and litdata. Warm cache, tokens per second.

Ours is what a run reads: a dataset of tars, windows in the order of `data.shuffle_shards` shards,
inputs and targets of a step as int64. Each side counts L tokens per window.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from forescale.data.dataset import Dataset
from forescale.data.feed import Feed
from forescale.data.mixture import Mixture, MixtureStage
from forescale.data.order import Order
from forescale.data.prepare.writer import ShardWriter, write_manifest
from forescale.data.stream import StepShare, stream
from forescale.data.tokenizer import Vocabulary, byte_tokenizer
from forescale.ground.storage import FileEntry
from tests.benchmarks.pairing import Result, interleaved

SHUFFLE_SHARDS = 8  # the default in conf/data
END, VOCABULARY = 256, 257
WINDOW = 2048


@dataclass(frozen=True)
class Sizes:
    """step: tokens per step of one rank, its share of a batch of several million; members: of the
    tar for webdataset; seconds: per measurement."""

    shards: int
    shard_tokens: int
    step: int
    members: int
    seconds: float


REAL = Sizes(shards=8, shard_tokens=1 << 22, step=1 << 18, members=4096, seconds=0.4)
TOY = Sizes(shards=2, shard_tokens=1 << 16, step=1 << 14, members=8, seconds=0.01)


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, sizes)
        results = [
            compare(
                rounds,
                root,
                f"stream against {name}, windows of {length:,}",
                sizes,
                gather,
                0,
                length,
                "at least 0.8" if gather is rows else "",
            )
            for length in (2048, 256)
            for name, gather in (("a memmap", rows), ("a memmap at numpy's fastest", strided))
        ]
        write_members(root, sizes.members)
        name = f"stream against webdataset's decode() of {WINDOW:,}-token .npy"
        results.append(compare(rounds, root, name, sizes, webdataset, 0, WINDOW, "at least 20"))
        if find_spec("litdata") is None:
            print("stream against litdata: not measured, it isn't installed (pip install litdata)")
            return results
        for workers in (0, 1):
            name = f"stream against litdata's StreamingDataset, {workers} workers"
            write_chunks(root)
            results.append(
                compare(rounds, root, name, sizes, litdata, workers, WINDOW, "at least 2")
            )
    return results


def compare(
    rounds: int,
    root: Path,
    name: str,
    sizes: Sizes,
    other: Callable,
    workers: int,
    length: int,
    goal: str,
) -> Result:
    with ExitStack() as stack:
        sides = []
        for batches in (product, other):
            stream = stack.enter_context(closing(batches(root, length, sizes.step, workers)))
            sides.append(partial(rate, stream, sizes.seconds))
        read = 0
        while read < sizes.shards * sizes.shard_tokens:  # everything once, to warm the caches
            read += next(sides[0].args[0])
        rates = interleaved(rounds, *sides)
    return Result(name, "M tokens/s", ("ours", other.__name__), rates, goal)


def rate(batches: Iterator[int], seconds: float) -> float:
    """Return the throughput in million tokens per second."""
    next(batches)  # the batch that was prepared while the other side was measured
    began, tokens = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        tokens += next(batches)
    return tokens / spent / 1e6


def product(root: Path, length: int, step: int, workers: int) -> Iterator[int]:
    split = Dataset(root / "dataset").split("train")
    order = Order(split.shard_tokens, length, 1, SHUFFLE_SHARDS)
    feed = Feed({"data": split}, Mixture({"data": order}, [MixtureStage.of(0, [1])], 1), VOCABULARY)
    windows = step // length
    micro = max(1, windows // 8)
    for batch in stream(feed, StepShare(windows, micro), range(1 << 40), 0, workers=workers):
        yield sum(m.tokens.numel() for m in batch.micro)


def memmap(root: Path, length: int, step: int) -> tuple[np.memmap, Iterator[np.ndarray]]:
    """Return the tokens, and the first tokens of the windows of each step, in random order."""
    data = np.memmap(root / "tokens.bin", "<u2", "r")
    firsts = np.random.default_rng(0).permutation((len(data) - 1) // length) * length
    windows = step // length
    steps = [firsts[at : at + windows] for at in range(0, len(firsts) - windows, windows)]
    return data, cycle(steps)


def rows(root: Path, length: int, step: int, workers: int) -> Iterator[int]:
    """Window by window, as training scripts do, without unnecessary copies."""
    data, steps = memmap(root, length, step)
    for starts in steps:
        pair = np.empty((2, len(starts), length), np.int64)
        for row, start in enumerate(starts.tolist()):
            window = data[start : start + length + 1]
            pair[0, row], pair[1, row] = window[:-1], window[1:]
        yield torch.from_numpy(pair)[0].numel()


def strided(root: Path, length: int, step: int, workers: int) -> Iterator[int]:
    """All windows of a step with one index into a strided view of the file, without any check."""
    data, steps = memmap(root, length, step)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(data), length + 1)
    for starts in steps:
        pair, rows = np.empty((2, len(starts), length), np.int64), windows[starts]
        pair[0], pair[1] = rows[:, :-1], rows[:, 1:]
        yield torch.from_numpy(pair)[0].numel()


def webdataset(root: Path, length: int, step: int, workers: int) -> Iterator[int]:
    """Members in stored order: no shuffle, no batches, no int64."""
    from webdataset import WebDataset

    while True:
        for sample in WebDataset(str(root / "members.tar"), shardshuffle=False).decode():
            yield len(sample["npy"])


def litdata(root: Path, length: int, step: int, workers: int) -> Iterator[int]:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    loader = TokensLoader(block_size=length + 1)
    data = StreamingDataset(str(root / "chunks"), item_loader=loader, shuffle=True)
    while True:
        for batch in StreamingDataLoader(data, batch_size=step // length // 8, num_workers=workers):
            batch = batch.long()
            yield batch[:, :-1].numel()


def write(root: Path, sizes: Sizes) -> None:
    """Write a dataset of random tokens, and the same tokens as one flat file."""
    path, rng = root / "dataset", np.random.default_rng(0)
    path.mkdir()
    files, shards = dict[str, FileEntry](), []
    with open(root / "tokens.bin", "wb") as flat:
        for number in range(sizes.shards):
            writer = ShardWriter(path, f"train-{number:06d}", np.dtype("uint16"), 1 << 20)
            for _ in range(sizes.shard_tokens // 1024):
                document = np.append(rng.integers(0, 256, 1023), END).astype("<u2")
                writer.add(document)
                flat.write(document)
            row, entries = writer.finish()
            shards.append(row)
            files |= entries
    totals = {key: sum(row[key] for row in shards) for key in ("tokens", "documents")}
    splits = {"train": {**totals, "bytes": 0, "shards": shards}}
    vocabulary = Vocabulary(byte_tokenizer().to_str().encode(), VOCABULARY, END)
    write_manifest(path, files, vocabulary, splits, "0" * 64, {}, {})


def write_members(root: Path, count: int) -> None:
    from webdataset import TarWriter

    tokens = np.fromfile(root / "tokens.bin", "<u2", count * WINDOW).reshape(count, WINDOW)
    with TarWriter(str(root / "members.tar")) as tar:
        for number, window in enumerate(tokens):
            tar.write({"__key__": f"{number:06d}", "npy": window})


def write_chunks(root: Path) -> None:
    """Write the same tokens in litdata's format, in chunks of 32 MB."""
    from litdata import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    if (root / "chunks").exists():
        return
    writer = BinaryWriter(str(root / "chunks"), chunk_bytes=1 << 25, item_loader=TokensLoader())
    tokens = np.fromfile(root / "tokens.bin", "<u2").astype(np.int32)
    block = (WINDOW + 1) * 128
    for number, at in enumerate(range(0, len(tokens) - block, block)):
        writer[number] = torch.from_numpy(tokens[at : at + block])
    writer.done()
    writer.merge()
