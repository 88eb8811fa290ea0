"""From documents to a published dataset: hashes, duplicates, tokenizer, tokens, shuffle, shards.

    read and hash      units -> hashes                         (forescale.data.prepare.dedupe)
    find duplicates    ranges of hashes over all units -> what is kept, the bounds of the splits
    sample             units -> text for the tokenizer and the compressors (sample)
    tokenise           units -> tokens, sorted by where the shuffle puts them (encode)
    write shards       ranges of the shuffle over all units -> tars, manifest (assemble)

Invariant: the same documents and BuildConfig give the same bytes, whatever the number of workers
and of interrupted tries before; and the output either holds all of it or does not exist.

The source is read two or three times instead of being held. Memory, for any size of corpus: some
400 MB a process, the largest document (about 10 bytes for each of its own beyond a megabyte), and
some hundred bytes for each file and unit of the source. Measured: 5 GB of JSON lines, 1.4 million
documents, one of them of 10 MB, on 2 workers: 98 MB in the parent, 314 MB in a worker
(tests/benchmarks/bench_build.py --gigabytes 5 --tokenizer bytes); with a BPE trained on 64 MB of
the text 139 MB and 312 MB. Disk beside the dataset, while it is made: once the dataset's size
again, and some 50 bytes a document.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from forescale.data.dataset import FORMAT, MANIFEST, TOKENIZER
from forescale.data.prepare.assemble import AssembleJob, plan_shards
from forescale.data.prepare.claim import expect_same, held
from forescale.data.prepare.columns import UnitWriter, facts, finished
from forescale.data.prepare.dedupe import HashJob, RangeJob, Run, range_edges
from forescale.data.prepare.encode import EncodeJob, TokenRun
from forescale.data.prepare.pool import Pool, Task
from forescale.data.prepare.report import Totals
from forescale.data.prepare.sample import TOKENIZER as TOKENIZER_SAMPLE
from forescale.data.prepare.sample import BaselinesJob, SampleJob, texts
from forescale.data.prepare.selection import SPLITS, ChangedError, NoTextError, Plan, choose
from forescale.data.prepare.work import Work, wanted, work_path
from forescale.data.progress import Meter, Progress, silent
from forescale.data.text.documents import Report, Source, Unit
from forescale.data.tokenizer import Vocabulary, given_tokenizer, train_bpe, vocabulary_of
from forescale.errors import UserError
from forescale.storage import FileEntry, write_file, write_json, write_table


@dataclass(frozen=True)
class BuildConfig:
    """All that decides a dataset beside its documents; it goes into the manifest."""

    # "bpe" (trained on a sample of the training split), "bytes", or a tokenizer.json or its folder
    tokenizer: str = "bpe"
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
        if self.tokenizer_bytes < 1:
            raise UserError("tokenizer_bytes", f"{self.tokenizer_bytes} is none", "take 1 or more")


def build_dataset(
    source: Source,
    output: str | Path,
    config: BuildConfig | None = None,
    progress: Progress = silent,
    workers: int = 1,
) -> Path:
    """Build a dataset at `output`, or find it there, finished, made from the same.

    workers: processes; with one all is done in this one, more are started as `python -c` and get a
    pickled copy of the source. Interrupted or killed at any time it leaves no `output`, but a
    directory beside it (see work.py) from which the next try goes on. A second process
    with the same output waits for the first. Raises UserError for sources without text, where a
    worker is killed, and where `output` holds something else.
    """
    output, config = Path(output), config or BuildConfig()
    config.check()
    if workers < 1:
        raise UserError("workers", f"{workers} is none", "take 1 or more")
    given = given_tokenizer(config.tokenizer)
    if given is not None:
        vocabulary_of(given, config.tokenizer, config.end_of_text)  # the sentence, before any work
    request = _request(source, config, given)
    if not output.exists() or work_path(output).exists():
        # A finished one needs no lock, and may lie where nobody can write.
        with held(output, progress):
            if not output.exists():
                _build(source, output, config, given, request, progress, workers)
            elif (left := work_path(output)).exists():  # killed between its name and the clearing
                shutil.rmtree(left)
    expect_same(output, request)
    return output


def _build(
    source: Source,
    output: Path,
    config: BuildConfig,
    given: bytes | None,
    request: dict[str, Any],
    progress: Progress,
    workers: int,
) -> None:
    units = source.units()
    work = Work(output, wanted(request, source, units), progress)
    try:
        with Pool(workers) as pool:
            _Build(source, units, config, given, request, work, pool, progress).run()
        work.publish()
    except (ChangedError, NoTextError):
        work.remove()  # it would be taken up again
        raise
    except BaseException:
        work.remove_if_empty()
        raise


@dataclass
class _Build:
    """One build: its phases in their order, each leaving finished units in the work directory."""

    source: Source
    units: list[Unit]
    config: BuildConfig
    given: bytes | None  # a tokenizer.json, where none is trained
    request: dict[str, Any]
    work: Work
    pool: Pool
    progress: Progress

    def run(self) -> None:
        runs, sizes = self._hash()
        plan = self._plan(runs)
        self._sample(plan)
        raw = self._tokenizer()
        vocabulary = vocabulary_of(raw, self.config.tokenizer, self.config.end_of_text)
        self._encode(plan, vocabulary, sizes)
        rows, entries = self._assemble(vocabulary)
        self._finish(plan, vocabulary, rows, entries)

    def _phase(self, name: str, unit: str, total: int, tasks: Sequence[Task]) -> None:
        meter = Meter(self.progress, name, total, unit)
        self.pool.run(tasks, meter)
        meter.end()

    def _each_unit(self, job: Any, *more: Sequence[Any]) -> list[Task]:
        items = zip(range(len(self.units)), self.units, *more, strict=True)
        return [Task(item[1].label, job, item, item[1].size) for item in items]

    def _facts(self, directory: Path) -> Iterator[dict[str, Any]]:
        for number in range(len(self.units)):
            yield facts(directory / f"{number:06d}")

    def _hash(self) -> tuple[list[list[Run]], list[int]]:
        """Runs and bytes of every unit."""
        total = sum(unit.size for unit in self.units)
        job = HashJob(self.source, self.work.hashes)
        self._phase("read and hash", "bytes", total, self._each_unit(job))
        left_out, runs, sizes = Report(), [], []
        for found in self._facts(self.work.hashes):
            runs.append([Run(*run) for run in found["runs"]])
            sizes.append(found["bytes"])
            left_out.merge(Report(**found["report"]))
        if not any(runs):
            why = ", ".join(f"{count} {reason}" for reason, count in left_out.counts.items())
            todo = f"left out: {why or 'nothing'}"
            raise NoTextError("the source", "holds no usable document", todo)
        return runs, sizes

    def _plan(self, runs: list[list[Run]]) -> Plan:
        count = sum(run.distinct for unit in runs for run in unit)
        edges = range_edges(count)
        job = RangeJob(self.work.hashes, self.work.ranges, runs)
        tasks = [
            Task(f"hashes, range {i + 1} of {len(edges) - 1}", job, (i, low, high))
            for i, (low, high) in enumerate(pairwise(edges))
        ]
        self._phase("find duplicates", "documents", count, tasks)
        ranges = [self.work.ranges / f"{i:04d}" for i in range(len(tasks))]
        sampled = self.config.tokenizer_bytes if self.given is None else 0
        bounds = choose(ranges, self.config.validation, sampled)
        return Plan(self.work.hashes, ranges, bounds, self.config.validation)

    def _sample(self, plan: Plan) -> None:
        if not (plan.bounds.tokenizer or plan.bounds.compared):
            return
        job = SampleJob(self.source, plan, self.work.samples, self.config.tokenizer_bytes)
        total = sum(unit.size for unit in self.units)
        self._phase("sample", "bytes", total, self._each_unit(job))

    def _tokenizer(self) -> bytes:
        """The bytes of its tokenizer.json."""
        if self.given is not None:
            return self.given
        path, done = self.work.tokenizer, 0
        if found := finished(path):
            return found["json"].encode()

        def sampled() -> Iterator[str]:
            nonlocal done
            for text in texts(self.work.samples, len(self.units), TOKENIZER_SAMPLE):
                yield text.decode("utf-8")
                done += len(text)
                self.progress("train the tokenizer", done, None, "bytes")

        trained = train_bpe(sampled(), self.config.vocab_size).to_str()
        self.progress("train the tokenizer", done, done, "bytes")
        with UnitWriter(path) as out:
            out.finish({"json": trained})
        return trained.encode()

    def _encode(self, plan: Plan, vocabulary: Vocabulary, sizes: list[int]) -> None:
        work, seed = self.work, self.config.seed
        job = EncodeJob(self.source, plan, work.tokens, vocabulary, seed)
        tasks = self._each_unit(job, sizes)
        if plan.bounds.compared:
            compare = BaselinesJob(work.samples, len(self.units))
            tasks.append(Task("compressors", compare, work.baselines, 1 << 60))
        self._phase("tokenise", "bytes", sum(sizes), tasks)

    def _assemble(self, vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, FileEntry]]:
        """The manifest's rows of every split, and the files that have been written."""
        work, dtype, members = self.work, vocabulary.dtype, self.config.member_tokens
        runs = [[TokenRun(*run) for run in found["runs"]] for found in self._facts(work.tokens)]
        shards = {s: plan_shards(work.tokens, runs, s, self.config.shard_tokens) for s in SPLITS}
        job = AssembleJob(work.tokens, runs, work.rows, work.stage, dtype, members)
        tasks = [Task(s.name, job, (split, s), s.tokens) for split in SPLITS for s in shards[split]]
        self._phase("write shards", "tokens", sum(task.weight for task in tasks), tasks)
        rows: dict[str, Any] = {}
        entries: dict[str, FileEntry] = {}
        for split in SPLITS:
            found = [facts(work.rows / shard.name) for shard in shards[split]]
            rows[split] = [f["row"] for f in found]
            entries |= {n: FileEntry(**e) for f in found for n, e in f["files"].items()}
        return rows, entries

    def _finish(
        self,
        plan: Plan,
        vocabulary: Vocabulary,
        rows: dict[str, Any],
        entries: dict[str, FileEntry],
    ) -> None:
        """Write what speaks of the whole: tokenizer, manifest, the table of files."""
        totals, corpus, stage = Totals(self.source.sources), hashlib.sha256(), self.work.stage
        both = (self._facts(self.work.hashes), self._facts(self.work.tokens))
        for unit, hashed, encoded in zip(self.units, *both, strict=True):
            totals.add(unit, hashed, encoded)
            corpus.update(encoded["digest"].encode())
        entries[TOKENIZER] = write_file(stage / TOKENIZER, vocabulary.raw)
        manifest = {
            "format": FORMAT,
            "dtype": vocabulary.dtype.name,
            "tokenizer": {
                "file": TOKENIZER,
                "sha256": entries[TOKENIZER].sha256,
                "vocab_size": vocabulary.size,
                "end_of_text": vocabulary.end,
            },
            "splits": {s: {**totals.splits[s], "shards": rows[s]} for s in SPLITS},
            "corpus": {
                "sha256": corpus.hexdigest(),
                "documents": sum(split["documents"] for split in totals.splits.values()),
            },
            "build": self.request,
            "report": totals.as_dict(),
            "baselines": (facts(self.work.baselines) or None) if plan.bounds.compared else None,
        }
        entries[MANIFEST] = write_json(stage / MANIFEST, manifest)
        write_table(stage, entries)


def _request(source: Source, config: BuildConfig, given: bytes | None) -> dict[str, Any]:
    """What was asked for, without machine paths: the same request finds the dataset finished."""
    request = {"source": source.describe(), **asdict(config)}
    if given is not None and config.tokenizer != "bytes":
        name = Path(config.tokenizer).name
        request["tokenizer"] = f"{name} {hashlib.sha256(given).hexdigest()}"
    return json.loads(json.dumps(request))
