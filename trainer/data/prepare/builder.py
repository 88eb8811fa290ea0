"""Build a dataset from documents: hashes, duplicates, tokenizer, tokens, shuffle, shards.

    read and hash      units -> hashes                         (forescale.data.prepare.selection)
    find duplicates    ranges of hashes over all units -> selection, bounds of the splits
    sample             units -> text for the tokenizer and the compressors (sample)
    tokenise           units -> tokens, sorted by shuffle key (encode)
    write shards       ranges of the shuffle over all units -> tars, manifest (assemble)

Invariant: the same documents and BuildConfig give the same bytes, independent of the number of
workers and of earlier interrupted attempts; and the output is either complete or doesn't exist.

The source is read two or three times instead of being held in memory. Memory, for any size of
corpus: about 400 MB per process, plus the largest document (about 10 bytes for each of its bytes
beyond a megabyte), plus some hundred bytes for each file and unit of the source. Measured: 5 GB of
JSON lines, 1.4 million documents, one of them of 10 MB, on 2 workers: 98 MB in the parent, 314 MB
in a worker (tests/benchmarks/bench_build.py --gigabytes 5 --tokenizer bytes); with a BPE trained on
64 MB of the text 139 MB and 312 MB. Additional disk space while building: once the dataset's size,
and about 50 bytes per document.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from forescale.data.dataset import ORIGINS
from forescale.data.prepare.assemble import AssembleJob, origins, plan_shards
from forescale.data.prepare.columns import UnitWriter, facts, finished
from forescale.data.prepare.encode import EncodeJob, TokenRun
from forescale.data.prepare.pool import Pool, Task
from forescale.data.prepare.report import Totals
from forescale.data.prepare.sample import TOKENIZER, BaselinesJob, SampleJob, texts
from forescale.data.prepare.selection import (
    SPLITS,
    VALIDATION,
    ChangedError,
    HashJob,
    HashRun,
    NoTextError,
    RangeJob,
    Selection,
    choose,
    range_edges,
)
from forescale.data.prepare.work import Work, build_once, expect_same, work_request
from forescale.data.prepare.writer import write_manifest
from forescale.data.text.documents import DocumentSource, ReadingReport, Unit
from forescale.data.tokenizer import Vocabulary, given_tokenizer, train_bpe, vocabulary_of
from forescale.ground.console import Meter, Progress, silent
from forescale.ground.errors import UserError
from forescale.ground.storage import FileEntry, write_json


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides a dataset except its documents; stored in the manifest."""

    # "bpe" (trained on a sample of the training split), "bytes", or a tokenizer.json or its folder
    tokenizer: str = "bpe"
    vocab_size: int = 4096  # entries of a trained BPE
    end_of_text: str | None = None  # token of a given tokenizer; None: try common names
    validation: float = 0.02  # share of the documents, chosen by the hash of their text
    seed: int = 0  # for the order of the documents
    shard_tokens: int = 1 << 26
    member_tokens: int = 1 << 20
    tokenizer_bytes: int = 64_000_000  # of training text, chosen by hash, that a BPE is trained on

    def check(self) -> None:
        if not 0 <= self.validation <= 0.5:
            problem = f"{self.validation} is out of range"
            raise UserError("validation", problem, "set it to 0 to 0.5")
        if not 1 <= self.member_tokens <= self.shard_tokens:
            todo = "choose 1 <= member_tokens <= shard_tokens"
            raise UserError("member_tokens, shard_tokens", "are inconsistent", todo)
        if self.tokenizer_bytes < 1:
            problem = f"{self.tokenizer_bytes} is too small"
            raise UserError("tokenizer_bytes", problem, "set it to 1 or more")


def build_dataset(
    source: DocumentSource,
    output: str | Path,
    config: BuildConfig | None = None,
    progress: Progress = silent,
    workers: int = 1,
) -> Path:
    """Build a dataset at `output`, or find a finished one there that was built from the same
    request.

    workers: processes; with one, everything runs in this process, others are started as `python -c`
    and get a pickled copy of the source. If the build is interrupted or killed, there is no
    `output`, but a directory beside it (see work.py) from which the next attempt continues. A
    second process with the same output waits for the first. Raises UserError for sources without
    text, if a worker is killed, and if `output` holds something else.
    """
    output, config = Path(output), config or BuildConfig()
    config.check()
    if workers < 1:
        raise UserError("workers", f"{workers} is too small", "set it to 1 or more")
    tokenizer = given_tokenizer(config.tokenizer)
    if tokenizer is not None:
        # Here already, so that its errors are raised before any work.
        vocabulary_of(tokenizer, config.tokenizer, config.end_of_text)
    request = _request(source, config, tokenizer)

    def build() -> None:
        units = source.units()
        work = Work(output, work_request(request, source, units), progress)
        try:
            with Pool(workers) as pool:
                _Build(source, units, config, tokenizer, request, work, pool, progress).run()
            work.publish()
        except (ChangedError, NoTextError):
            work.remove()  # otherwise the next attempt would use it again
            raise
        except BaseException:
            work.remove_if_empty()
            raise

    build_once(output, progress, build)
    expect_same(output, request)
    return output


def _request(source: DocumentSource, config: BuildConfig, raw: bytes | None) -> dict[str, Any]:
    """Return the request, without machine paths: an equal request finds the finished dataset."""
    request = {"source": source.describe(), **asdict(config)}
    if raw is not None and config.tokenizer != "bytes":
        name = Path(config.tokenizer).name
        request["tokenizer"] = f"{name} {hashlib.sha256(raw).hexdigest()}"
    return json.loads(json.dumps(request))


@dataclass
class _Build:
    """One build: its phases in order; each leaves finished units in the work directory."""

    source: DocumentSource
    units: list[Unit]
    config: BuildConfig
    tokenizer: bytes | None  # a tokenizer.json, if none is trained
    request: dict[str, Any]
    work: Work
    pool: Pool
    progress: Progress

    def run(self) -> None:
        runs, sizes = self._hash()
        selection = self._select(runs)
        self._sample(selection)
        raw = self.tokenizer or self._trained_tokenizer()
        vocabulary = vocabulary_of(raw, self.config.tokenizer, self.config.end_of_text)
        self._encode(selection, vocabulary, sizes)
        encoded = [[TokenRun(*r) for r in unit["runs"]] for unit in self._facts(self.work.tokens)]
        rows, entries = self._assemble(encoded, vocabulary)
        entries |= self._write_origins(encoded)
        self._finish(selection, vocabulary, rows, entries)

    def _phase(self, name: str, unit: str, total: int, tasks: Sequence[Task]) -> None:
        meter = Meter(self.progress, name, total, unit)
        self.pool.run(tasks, meter)
        meter.end()

    def _each_unit(self, job: Any, *columns: Sequence[Any]) -> list[Task]:
        items = zip(range(len(self.units)), self.units, *columns, strict=True)
        return [Task(item[1].label, job, item, item[1].size) for item in items]

    def _facts(self, directory: Path) -> Iterator[dict[str, Any]]:
        for number in range(len(self.units)):
            yield facts(directory / f"{number:06d}")

    def _hash(self) -> tuple[list[list[HashRun]], list[int]]:
        """Return the runs and the size in bytes of every unit."""
        total = sum(unit.size for unit in self.units)
        job = HashJob(self.source, self.work.hashes)
        self._phase("read and hash", "bytes", total, self._each_unit(job))
        left_out, runs, sizes = ReadingReport(), [], []
        for unit in self._facts(self.work.hashes):
            runs.append([HashRun(*run) for run in unit["runs"]])
            sizes.append(unit["bytes"])
            left_out.merge(ReadingReport(**unit["report"]))
        if not any(runs):
            why = ", ".join(f"{count} {reason}" for reason, count in left_out.counts.items())
            todo = f"left out: {why or 'nothing'}"
            raise NoTextError("the source", "has no usable document", todo)
        return runs, sizes

    def _select(self, runs: list[list[HashRun]]) -> Selection:
        count = sum(run.distinct for unit in runs for run in unit)
        edges = range_edges(count)
        job = RangeJob(self.work.hashes, self.work.ranges, runs)
        tasks = [
            Task(f"hashes, range {i + 1} of {len(edges) - 1}", job, (i, low, high))
            for i, (low, high) in enumerate(pairwise(edges))
        ]
        self._phase("find duplicates", "documents", count, tasks)
        ranges = [self.work.ranges / f"{i:04d}" for i in range(len(tasks))]
        sampled = self.config.tokenizer_bytes if self.tokenizer is None else 0
        bounds = choose(ranges, self.config.validation, sampled)
        return Selection(self.work.hashes, ranges, bounds, self.config.validation)

    def _sample(self, selection: Selection) -> None:
        if not (selection.bounds.tokenizer or selection.bounds.compared):
            return
        job = SampleJob(self.source, selection, self.work.samples, self.config.tokenizer_bytes)
        total = sum(unit.size for unit in self.units)
        self._phase("sample", "bytes", total, self._each_unit(job))

    def _trained_tokenizer(self) -> bytes:
        path, done = self.work.tokenizer, 0
        if unit := finished(path):
            return unit["json"].encode()

        def sampled() -> Iterator[str]:
            nonlocal done
            for text in texts(self.work.samples, len(self.units), TOKENIZER):
                yield text.decode("utf-8")
                done += len(text)
                self.progress("train the tokenizer", done, None, "bytes")

        trained = train_bpe(sampled(), self.config.vocab_size).to_str()
        self.progress("train the tokenizer", done, done, "bytes")
        with UnitWriter(path) as out:
            out.finish({"json": trained})
        return trained.encode()

    def _encode(self, selection: Selection, vocabulary: Vocabulary, sizes: list[int]) -> None:
        work, seed = self.work, self.config.seed
        job = EncodeJob(self.source, selection, work.tokens, vocabulary, seed)
        tasks = self._each_unit(job, sizes)
        if selection.bounds.compared:
            compare = BaselinesJob(work.samples, len(self.units))
            tasks.append(Task("compressors", compare, work.baselines, 1 << 60))
        self._phase("tokenise", "bytes", sum(sizes), tasks)

    def _assemble(
        self, runs: list[list[TokenRun]], vocabulary: Vocabulary
    ) -> tuple[dict[str, Any], dict[str, FileEntry]]:
        """Return the manifest's rows of every split, and the entries of the new files. runs: of
        every unit."""
        work, dtype, members = self.work, vocabulary.dtype, self.config.member_tokens
        # A worker gets them with each shard, and needs no file types.
        runs = [[run._replace(kinds=()) for run in of] for of in runs]
        shards = {s: plan_shards(work.tokens, runs, s, self.config.shard_tokens) for s in SPLITS}
        job = AssembleJob(work.tokens, runs, work.rows, work.stage, dtype, members)
        tasks = [Task(s.name, job, (split, s), s.tokens) for split in SPLITS for s in shards[split]]
        self._phase("write shards", "tokens", sum(task.weight for task in tasks), tasks)
        rows: dict[str, Any] = {}
        entries: dict[str, FileEntry] = {}
        for split in SPLITS:
            units = [facts(work.rows / shard.name) for shard in shards[split]]
            rows[split] = [unit["row"] for unit in units]
            entries |= {n: FileEntry(**e) for unit in units for n, e in unit["files"].items()}
        return rows, entries

    def _write_origins(self, runs: list[list[TokenRun]]) -> dict[str, FileEntry]:
        """Write where each held-out document comes from; return the entry of the file. runs: of
        every unit."""
        if any(r.split == VALIDATION and len(r.kinds) != r.documents for of in runs for r in of):
            return {}  # units of an earlier version that was interrupted
        inputs = [unit.source for unit in self.units]
        rows = origins(self.work.tokens, runs, inputs, self.source.sources)
        return {ORIGINS: write_json(self.work.stage / ORIGINS, rows, compact=True)}

    def _finish(
        self,
        selection: Selection,
        vocabulary: Vocabulary,
        rows: dict[str, Any],
        entries: dict[str, FileEntry],
    ) -> None:
        totals, corpus, work = Totals(self.source.sources), hashlib.sha256(), self.work
        both = (self._facts(work.hashes), self._facts(work.tokens))
        for unit, hashed, encoded in zip(self.units, *both, strict=True):
            totals.add(unit, hashed, encoded)
            corpus.update(encoded["digest"].encode())
        splits = {s: {**totals.splits[s], "shards": rows[s]} for s in SPLITS}
        compared = (facts(work.baselines) or None) if selection.bounds.compared else None
        digest, report = corpus.hexdigest(), totals.as_dict()
        write_manifest(
            work.stage, entries, vocabulary, splits, digest, self.request, report, compared
        )
