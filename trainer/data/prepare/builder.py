"""Build a dataset from documents: hashes, duplicates, tokenizer, tokens, shuffle, shards.

    curate             units -> the text that steps keep       (forescale.data.curate.units)
    read and hash      units -> hashes                         (forescale.data.prepare.selection)
    find duplicates    ranges of hashes over all units -> selection, bounds of the splits
    sample             units -> text for the tokenizer and the compressors (sample)
    tokenise           units -> tokens, sorted by shuffle key      (tokens)
    write shards       ranges of the shuffle over all units -> tars, manifest (tokens)

Invariant: the same documents and BuildConfig give the same bytes, independent of the number of
workers and of earlier interrupted attempts; and the output is either complete or doesn't exist.

The source is read two or three times instead of being held in memory. Memory, for any size of
corpus: about 400 MB per process, plus the largest document (about 10 bytes for each of its bytes
beyond a megabyte), plus some hundred bytes for each file and unit of the source; and once up to 1.2
GB in a worker, where compressors are compared on up to 16 MB of held-out text. Measured: 5 GB of
JSON lines, 1.4 million documents, one of them of 10 MB, on 2 workers: 98 MB in the parent, 314 MB
in a worker (tests/benchmarks/bench_build.py --gigabytes 5 --tokenizer bytes); with a BPE trained on
64 MB of the text 139 MB and 312 MB. Additional disk space while building: once the dataset's size,
and about 50 bytes per document.
"""

import hashlib
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from forescale.data.curate.across import Across
from forescale.data.curate.curation import Curation
from forescale.data.curate.units import Curated, attributes_of, curate_unit, tally_of
from forescale.data.dataset import CURATION, ORIGINS
from forescale.data.prepare.columns import UnitWriter, facts, finished
from forescale.data.prepare.pool import Pool, Task, Tick, run_here
from forescale.data.prepare.sample import TOKENIZER, compress_samples, sample_unit, texts
from forescale.data.prepare.selection import (
    SPLITS,
    ChangedError,
    HashRun,
    NoTextError,
    Selection,
    choose,
    find_distinct,
    hash_unit,
    range_edges,
)
from forescale.data.prepare.share import work_path
from forescale.data.prepare.sums import sums_of
from forescale.data.prepare.tokens import (
    AssembleJob,
    EncodeJob,
    ShardPlan,
    TokenRun,
    origins,
    plan_shards,
)
from forescale.data.prepare.work import (
    Work,
    expect_same,
    is_done,
    lock_of,
    work_request,
)
from forescale.data.prepare.writer import write_manifest
from forescale.data.text.documents import DocumentSource, ReadingReport, Unit
from forescale.data.tokenizer import Vocabulary, given_tokenizer, train_bpe, vocabulary_of
from forescale.ground.console import Progress, silent
from forescale.ground.errors import UserError, storage_error
from forescale.ground.storage import FileEntry, write_json


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides a dataset except its documents; stored in the manifest."""

    # "bpe" (trained on a sample of the training split), "bytes", or a tokenizer.json or its folder
    tokenizer: str = "bpe"
    vocab_size: int = 4096  # entries of a trained BPE
    end_of_text: str | None = None  # token of a given tokenizer; None: as end_of_text says
    # share of the documents, chosen by the hash of their text; small inputs give more
    validation: float = 0.02
    seed: int = 0  # for the order of the documents
    shard_tokens: int = 1 << 26
    member_tokens: int = 1 << 20
    tokenizer_bytes: int = 64_000_000  # of training text, chosen by hash, that a BPE is trained on
    parquet: bool = False  # write the text too (parquet.py)

    def describe(self) -> dict[str, Any]:
        """Return the settings as the manifest has them: `parquet` only if it is set, so that
        datasets from before it are found."""
        return {k: v for k, v in asdict(self).items() if k != "parquet" or v}

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
    curation: Curation | None = None,
    held_out: Sequence[str] = (),
) -> Path:
    """Build a dataset at `output`, or find a finished one there that was built from the same
    request.

    curation: what each document goes through before all else; None: nothing. held_out: inputs of
    the source that are held out whole; then no other text is. workers: processes; with one,
    everything runs in this process, others are started as `python -c` and get a pickled copy of the
    source. If the build is interrupted or killed, there is no `output`, but a directory beside it
    (see work.py) from which the next attempt continues. Processes with the same output, here and
    elsewhere, share its tasks (see share.py). Raises UserError for sources without text, if a
    worker is killed, and if `output` holds something else.
    """
    output, config = Path(output), config or BuildConfig()
    config.check()
    if workers < 1:
        raise UserError("workers", f"{workers} is too small", "set it to 1 or more")
    tokenizer = given_tokenizer(config.tokenizer)
    if tokenizer is not None:
        # Here already, so that its errors are raised before any work.
        vocabulary_of(tokenizer, config.tokenizer, config.end_of_text)
    # Without machine paths: an equal request finds the finished dataset.
    request = {"source": source.describe(), **config.describe()}
    if curation is not None:
        request["curation"] = curation.describe()
    if held_out:
        request["held_out"] = [*held_out]
    if tokenizer is not None and config.tokenizer != "bytes":
        digest = hashlib.sha256(tokenizer).hexdigest()
        request["tokenizer"] = f"{Path(config.tokenizer).name} {digest}"
    request = json.loads(json.dumps(request))

    if output.exists() and not work_path(output).exists():  # perhaps in a read-only directory
        expect_same(output, request)
        return output
    units = source.units()
    with lock_of(output, progress, "prepares to build it"):
        work = None
        if not is_done(output):
            work = Work(output, work_request(request, source, units), progress)
    if work is not None:
        with Pool(workers) as pool, _leaving(work, progress):
            _Build(source, units, config, tokenizer, request, work, pool, progress, curation).run()
    expect_same(output, request)
    return output


@contextmanager
def _leaving(work: Work, progress: Progress) -> Iterator[None]:
    """Leave a build as it ended. (Once it is published, its directory is gone.)"""
    try:
        yield
    except BaseException as e:
        if isinstance(e, UserError | OSError) and work.output.exists():
            work.finish()
            return
        is_useless = isinstance(e, ChangedError | NoTextError)  # else it would be used again
        known = storage_error(e) if isinstance(e, OSError) else None
        work.abandon(str(known or e) or type(e).__name__, is_useless, progress)
        if str(e) == signal.SIGUSR1.name and not work.crew.num_new:  # it would go on like this
            problem = "this start made no unit before its time limit"
            todo = "submit it again with a longer slurm.time"
            raise UserError(str(work.output), problem, todo) from None
        raise
    work.finish()


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
    curation: Curation | None = None

    def run(self) -> None:
        work, config, units = self.work, self.config, self.units
        if self.curation is not None:
            self._curate(self.curation)
        selection, sizes = self._select()
        bounds, total = selection.bounds, sum(unit.size for unit in units)
        if bounds.tokenizer or bounds.compared:
            sample = partial(sample_unit, selection, work.samples, config.tokenizer_bytes)
            self._phase("sample", "bytes", total, self._each_unit(sample, work.samples))
        if config.parquet:
            self._phase("write text", "bytes", total, self._text_tasks(selection))
        raw = self.tokenizer or self._trained_tokenizer()
        vocabulary = vocabulary_of(raw, config.tokenizer, config.end_of_text)
        encode = EncodeJob(selection, work.tokens, vocabulary, config.seed)
        tasks = self._each_unit(encode, work.tokens, sizes)
        if bounds.compared:
            compare = partial(compress_samples, work.samples, len(units))
            path = work.baselines
            tasks.append(Task("compressors", compare, (path,), max(sizes) + 1, path))
        self._phase("tokenise", "bytes", sum(sizes), tasks)
        shards = self._write_shards(vocabulary)
        publish = partial(self._publish, selection, vocabulary, shards)
        task = Task("the dataset", publish, (), 0, work.output)
        self.work.crew.run("publish", "datasets", 1, [task], run_here)

    def _publish(
        self,
        selection: Selection,
        vocabulary: Vocabulary,
        shards: Mapping[str, list[ShardPlan]],
        tick: Tick,
    ) -> None:
        """Write the manifest, and give the dataset its name."""
        work, bounds = self.work, selection.bounds
        rows, entries = self._assemble(shards)
        counted = zip(self.units, self._facts(work.hashes), self._facts(work.tokens), strict=True)
        splits, report, digest = sums_of(counted, self.source.sources, bounds)
        for name, split in splits.items():
            split["shards"] = rows[name]
        if self.config.parquet:
            tables = [facts(task.result) for task in self._text_tasks(selection)]
            report["text"] = {"files": [table["row"] for table in tables]}
            entries |= {n: FileEntry(**e) for table in tables for n, e in table["files"].items()}
        compared = (facts(work.baselines) or None) if bounds.compared else None
        if self.curation is not None:
            entries[CURATION], report["curation"] = self._audit(self.curation)
        write_manifest(
            work.stage, entries, vocabulary, splits, digest, self.request, report, compared
        )
        work.publish()

    def _audit(self, curation: Curation) -> tuple[FileEntry, dict[str, Any]]:
        """Write what the steps did; return the entry of that file, and its part of the report."""
        work = self.work
        tally = tally_of(self.across.counted, len(self.units)).as_dict()
        entry = write_json(work.stage / CURATION, tally)
        hashes = [unit["raw"] for unit in self._facts(work.curated)]
        audit = {
            "raw": hashlib.sha256("".join(hashes).encode()).hexdigest(),
            "file": CURATION,
            "sha256": entry.sha256,
            "steps": tally["steps"],
        }
        if curation.against:
            audit["against"] = self.across.earlier.places(work.output)
        return entry, audit

    def _curate(self, curation: Curation) -> None:
        """Put all documents through the steps, and read what they keep from now on."""
        job = partial(curate_unit, self.source, curation, self.work.curated)
        total = sum(unit.size for unit in self.units)
        self._phase("curate", "bytes", total, self._each_unit(job, self.work.curated))
        self.across = Across(self.work.path, self.work.curated, curation, self.units)
        self.across.run(self._phase)
        numbers = {unit: number for number, unit in enumerate(self.units)}
        self.source = Curated(self.source, curation, self.across, numbers)

    def _phase(self, name: str, unit: str, total: int, tasks: Sequence[Task]) -> None:
        """Do tasks, with all processes that build the dataset, until all are done."""
        pool = self.pool if len(tasks) > 1 else Pool(1)
        self.work.crew.run(name, unit, total, tasks, pool.run)

    def _each_unit(self, job: Any, folder: Path, *columns: Sequence[Any]) -> list[Task]:
        items = zip(range(len(self.units)), self.units, *columns, strict=True)
        return [
            Task(item[1].label, job, item, item[1].size, folder / f"{item[0]:06d}")
            for item in items
        ]

    def _text_tasks(self, selection: Selection) -> list[Task]:
        """Return the tasks that write the text of each unit as a table."""
        from forescale.data.prepare.parquet import ParquetJob  # with pyarrow

        curated, count = self.work.curated, len(self.units)
        attributes = attributes_of(curated, count) if self.curation is not None else {}
        rows, work = self.work.rows, self.work
        job = ParquetJob(selection, rows, work.parts, work.stage, attributes, self.source.sources)
        tasks = self._each_unit(job, rows)
        return [t._replace(result=rows / f"text-{t.result.name}.parquet") for t in tasks]

    def _facts(self, directory: Path) -> Iterator[dict[str, Any]]:
        for number in range(len(self.units)):
            yield facts(directory / f"{number:06d}")

    def _select(self) -> tuple[Selection, list[int]]:
        """Return the selected documents, and the size in bytes of every unit."""
        work, total = self.work, sum(unit.size for unit in self.units)
        tasks = self._each_unit(partial(hash_unit, self.source, work.hashes), work.hashes)
        self._phase("read and hash", "bytes", total, tasks)
        left_out, runs, sizes = ReadingReport(), [], []
        for unit in self._facts(work.hashes):
            runs.append([HashRun(*run) for run in unit["runs"]])
            sizes.append(unit["bytes"])
            left_out.merge(ReadingReport(**unit["report"]))
        if not any(runs):
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.counts.items())
            todo = f"left out: {reasons or 'nothing'}"
            raise NoTextError("the source", "has no usable document", todo)
        count = sum(run.distinct for unit in runs for run in unit)
        edges = range_edges(count)
        inputs = [unit.source for unit in self.units]
        job = partial(find_distinct, work.hashes, work.ranges, runs, inputs)
        ranges = [work.ranges / f"{i:04d}" for i in range(len(edges) - 1)]
        tasks = [
            Task(f"hashes, range {i + 1} of {len(ranges)}", job, (i, low, high), 0, ranges[i])
            for i, (low, high) in enumerate(pairwise(edges))
        ]
        self._phase("find duplicates", "documents", count, tasks)
        sampled = self.config.tokenizer_bytes if self.tokenizer is None else 0
        names = self.source.sources
        whole = [names.index(name) for name in self.request.get("held_out", ())]
        bounds = choose(ranges, self.config.validation, sampled, len(names), whole)
        selection = Selection(self.source, work.hashes, ranges, bounds)
        return selection, sizes

    def _trained_tokenizer(self) -> bytes:
        path = self.work.tokenizer

        def train(tick: Tick) -> None:
            def sampled() -> Iterator[str]:
                for text in texts(self.work.samples, len(self.units), TOKENIZER):
                    yield text.decode("utf-8")
                    tick(len(text), 0)

            if not finished(path):
                trained = train_bpe(sampled(), self.config.vocab_size).to_str()
                with UnitWriter(path) as out:
                    out.finish({"json": trained})

        task = Task("the tokenizer", train, (), 0, path)
        self.work.crew.run("train the tokenizer", "bytes", None, [task], run_here)
        return facts(path)["json"].encode()

    def _runs(self) -> list[list[TokenRun]]:
        return [[TokenRun(*run) for run in unit["runs"]] for unit in self._facts(self.work.tokens)]

    def _write_shards(self, vocabulary: Vocabulary) -> dict[str, list[ShardPlan]]:
        work, config = self.work, self.config
        # A worker gets them with each shard, and needs no file types.
        bare = [[run._replace(kinds=()) for run in of] for of in self._runs()]
        shards = {s: plan_shards(work.tokens, bare, s, config.shard_tokens) for s in SPLITS}
        job = AssembleJob(
            work.tokens, bare, work.rows, work.parts, work.stage, vocabulary.dtype,
            config.member_tokens,
        )  # fmt: skip
        tasks = [
            Task(s.name, job, (split, s), s.tokens, work.rows / s.name)
            for split in SPLITS
            for s in shards[split]
        ]
        self._phase("write shards", "tokens", sum(task.weight for task in tasks), tasks)
        return shards

    def _assemble(
        self, shards: Mapping[str, list[ShardPlan]]
    ) -> tuple[dict[str, Any], dict[str, FileEntry]]:
        """Return the manifest's rows of every split, and the entries of the files."""
        work = self.work
        rows: dict[str, Any] = {}
        entries: dict[str, FileEntry] = {}
        for split in SPLITS:
            units = [facts(work.rows / shard.name) for shard in shards[split]]
            rows[split] = [unit["row"] for unit in units]
            entries |= {n: FileEntry(**e) for unit in units for n, e in unit["files"].items()}
        inputs = [unit.source for unit in self.units]
        table = origins(work.tokens, self._runs(), inputs, self.source.sources)
        return rows, entries | {ORIGINS: write_json(work.stage / ORIGINS, table, compact=True)}
