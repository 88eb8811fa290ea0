"""From documents to a published dataset: plan, tokenizer, tokens, shuffle, shards, manifest.

Invariant: the same documents and BuildConfig give the same bytes, whatever the number of threads
and of interrupted tries before; and the output either holds all of it or does not exist.

The source is read several times instead of being held: to plan, for the tokenizer, the baselines
and the tokens. What is held is the token ids of the whole dataset (2 or 4 bytes each), because
documents are shuffled globally, and some 400 bytes a document: about 0.8 GB for each GB of text.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from trainer.data import baselines
from trainer.data.plan import SPLITS, Halves, Plan, pieces
from trainer.data.progress import Progress, silent
from trainer.data.shards import FORMAT, MANIFEST, TOKENIZER, Dataset
from trainer.data.text import Source
from trainer.data.tokenizer import (
    byte_tokenizer,
    end_of_text,
    load_tokenizer,
    token_bytes,
    train_bpe,
)
from trainer.data.writing import SplitWriter
from trainer.durable import staged, write_file, write_json, write_table
from trainer.errors import UserError

_BATCH = 2_000_000  # bytes of text that are encoded at a time
_PIECE = 1 << 20  # a longer document is encoded in pieces
_COMPARED = 16_000_000  # bytes of held-out text up to which compressors are tried


@dataclass(frozen=True)
class BuildConfig:
    """All that decides a dataset beside its documents; it goes into the manifest."""

    tokenizer: str = "bpe"  # "bpe" (trained on the training split), "bytes", or a tokenizer.json
    vocab_size: int = 4096  # of a trained BPE
    end_of_text: str | None = None  # of a given tokenizer; None: the usual names are tried
    validation: float = 0.02  # share of the documents, chosen by the hash of their text
    seed: int = 0  # of the order of the documents
    shard_tokens: int = 1 << 26
    member_tokens: int = 1 << 20
    tokenizer_bytes: int = 64_000_000  # of training text, chosen by hash, that a BPE is trained on

    def check(self) -> None:
        """Raises UserError for a value that makes no sense."""
        if not 0 <= self.validation <= 0.5:
            raise UserError("validation", f"{self.validation} is no share", "take 0 to 0.5")
        if not 1 <= self.member_tokens <= self.shard_tokens:
            todo = "take 1 <= member_tokens <= shard_tokens"
            raise UserError("member_tokens, shard_tokens", "don't fit each other", todo)


def build_dataset(
    source: Source,
    output: str | Path,
    config: BuildConfig | None = None,
    progress: Progress = silent,
) -> Path:
    """Build a dataset at `output`, or find it there, finished, made from the same.

    Interrupted or killed at any time it leaves no `output`; the next try starts clean. A second
    process with the same output waits for the first. Raises UserError for sources without text,
    and where `output` holds something else.
    """
    output, config = Path(output), config or BuildConfig()
    config.check()
    if not output.exists():  # a finished one needs no lock, and may lie where nobody can write
        with _lock(output, progress):
            if not output.exists():
                with staged(output) as stage:
                    _build(source, stage, config, progress)
    _expect_same(output, source, config)
    return output


def _build(source: Source, stage: Path, config: BuildConfig, progress: Progress) -> None:
    plan = Plan(source, config.validation, config.seed, progress)
    if len(plan.keys) == 1 and config.validation:
        plan = Plan(Halves(source, config.validation), config.validation, config.seed, progress)
        plan.held_out = np.arange(len(plan.keys)) == 1
    if not plan.bytes("train"):
        raise UserError("the source", "leaves no text to train on", "give more documents")
    with ThreadPoolExecutor(1) as pool:  # compressing releases the GIL
        compared = pool.submit(_baselines, plan)
        tokenizer, raw = _tokenizer(plan, config, progress)
        entries = {TOKENIZER: write_file(stage / TOKENIZER, raw)}
        sizes = token_bytes(tokenizer, config.tokenizer)
        end = end_of_text(tokenizer, config.tokenizer, config.end_of_text)
        dtype = np.dtype(np.uint16 if len(sizes) <= 1 << 16 else np.uint32)
        documents = _tokens(plan, tokenizer, sizes, np.array([end], dtype), progress)
        splits: dict[str, Any] = {}
        for name in SPLITS:
            writer = SplitWriter(stage, name, dtype, config.shard_tokens, config.member_tokens)
            for index in plan.shuffled(name):
                writer.add(documents[index])
            writer.finish()
            splits[name] = {**writer.totals(), "bytes": plan.bytes(name), "shards": writer.rows}
            entries |= writer.files
        del documents
        manifest = {
            "format": FORMAT,
            "dtype": dtype.name,
            "tokenizer": {
                "file": TOKENIZER,
                "sha256": entries[TOKENIZER].sha256,
                "vocab_size": len(sizes),
                "end_of_text": end,
            },
            "splits": splits,
            "corpus": {"sha256": plan.corpus_hash, "documents": len(plan.keys)},
            "build": _request(source, config),
            "report": plan.report.as_dict(),
            "baselines": compared.result(),
        }
    entries[MANIFEST] = write_json(stage / MANIFEST, manifest)
    write_table(stage, entries)


def _tokenizer(plan: Plan, config: BuildConfig, progress: Progress) -> tuple[Tokenizer, bytes]:
    """The tokenizer and the bytes of its tokenizer.json."""
    if config.tokenizer == "bpe":
        wanted = plan.sample_bytes(config.tokenizer_bytes)
        total, done = int(plan.lengths[wanted].sum()), 0

        def texts() -> Iterator[str]:
            nonlocal done
            for _, document in plan.documents(wanted):
                yield document.text.decode("utf-8")
                done += len(document.text)
                progress("train the tokenizer", done, total, "bytes")

        tokenizer = train_bpe(texts(), config.vocab_size)
        return tokenizer, tokenizer.to_str().encode()
    if config.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
        return tokenizer, tokenizer.to_str().encode()
    tokenizer = load_tokenizer(Path(config.tokenizer))
    return tokenizer, Path(config.tokenizer).read_bytes()


def _tokens(
    plan: Plan, tokenizer: Tokenizer, sizes: np.ndarray, end: np.ndarray, progress: Progress
) -> list[np.ndarray]:
    """The ids of every kept document, its end included, in corpus order, in the dtype of `end`."""
    # The text "<|endoftext|>" inside a document is text, not an end: it keeps its own bytes.
    tokenizer.encode_special_tokens = True
    documents: list[np.ndarray] = []
    total, done = int(plan.lengths.sum()), 0
    encoded = (row for batch in _batches(plan) for row in _encode(tokenizer, batch, end.dtype))
    for (_, name), parts in groupby(encoded, key=lambda row: row[:2]):
        ids = np.concatenate([*(part for _, _, part in parts), end])
        size = int(plan.lengths[len(documents)])
        if int(sizes[ids].sum()) != size:
            plan.report.add("not lossless in this tokenizer", name)
        documents.append(ids)
        done += size
        progress("tokenise", done, total, "bytes")
    return documents


def _batches(plan: Plan) -> Iterator[list[tuple[int, str, str]]]:
    """(document's index, its name, a piece of its text) in lists of about _BATCH bytes."""
    batch: list[tuple[int, str, str]] = []
    held = 0
    for index, document in plan.documents():
        for piece in pieces(document.text, _PIECE):
            batch.append((index, document.name, piece))
            held += len(piece)
            if held >= _BATCH:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


def _encode(
    tokenizer: Tokenizer, batch: list[tuple[int, str, str]], dtype: np.dtype
) -> Iterator[tuple[int, str, np.ndarray]]:
    encodings = tokenizer.encode_batch_fast([t for _, _, t in batch], add_special_tokens=False)
    for (index, name, _), encoding in zip(batch, encodings, strict=True):
        yield index, name, np.array(encoding.ids, dtype)


def _baselines(plan: Plan) -> dict[str, Any] | None:
    """None where nothing is held out, or too much to compress in seconds."""
    if not 0 < plan.bytes("validation") <= _COMPARED:
        return None
    sample = plan.sample(baselines.SAMPLE_FILES)
    if plan.lengths[sample].sum() > _COMPARED:
        sample = sample[np.cumsum(plan.lengths[sample]) <= _COMPARED]
    held_out: list[bytes] = []
    before: list[bytes] = []
    for index, document in plan.documents(np.concatenate([sample, plan.indices("validation")])):
        (held_out if plan.held_out[index] else before).append(document.text)
    return baselines.compress(held_out, before)


def _request(source: Source, config: BuildConfig) -> dict[str, Any]:
    """What was asked for, without machine paths: the same request finds the dataset finished."""
    request = {"source": source.describe(), **asdict(config)}
    if config.tokenizer not in ("bpe", "bytes"):
        load_tokenizer(Path(config.tokenizer))  # the sentence, where it is missing or bad
        digest = hashlib.sha256(Path(config.tokenizer).read_bytes()).hexdigest()
        request["tokenizer"] = f"{Path(config.tokenizer).name} {digest}"
    return request


def _expect_same(output: Path, source: Source, config: BuildConfig) -> None:
    have = Dataset(output).manifest["build"]
    want = json.loads(json.dumps(_request(source, config)))
    if differing := [key for key in want if have.get(key) != want[key]]:
        raise UserError(
            str(output),
            f"holds a dataset that was built otherwise ({', '.join(differing)} differ)",
            "choose another output, or remove it",
        )


@contextmanager
def _lock(output: Path, progress: Progress) -> Iterator[None]:
    """Held by one process at a time; the kernel lets go when its holder dies, however it does."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.parent / f".{output.name}.lock", "wb") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("wait for another process", 0, None, "done")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield
