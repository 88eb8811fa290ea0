"""`forescale shards`: build a dataset from text, with a report of all skipped text.

Corpora that are tokenised already are indexed in place; `forescale shards show` displays the
contents of a dataset.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from forescale.config.compose import parse
from forescale.config.job import Job, Problems
from forescale.config.schema import key, section
from forescale.config.suggest import nearest_first
from forescale.data.curate.curation import Curation
from forescale.data.dataset import MANIFEST, TOKENIZER, Dataset
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.pool import available
from forescale.data.prepare.show import show, summary_lines
from forescale.data.text.documents import Policy
from forescale.data.text.files import Files
from forescale.ground.console import progress_display
from forescale.ground.document import is_json, tell
from forescale.ground.errors import DONE, UserError
from forescale.ground.storage import cache_directory

_SHOW = {"windows": 3, "sequence_length": 256, "seed": 0}


@dataclass
class ShardsJob(Job):
    """Keys of `forescale shards`."""

    VERB: ClassVar[str] = "shards"
    TARGET: ClassVar[str] = "input"
    PRINTS: ClassVar = {"path": str, "existed": bool, "corpus_hash": str, "tokens": dict[str, int]}

    # text: folders, globs, files, URLs or hf:// datasets; or corpora of token ids
    input: list[str] = key([])
    output: str | None = key(None, common=True)  # directory of the dataset; must not exist yet
    # field of a JSON line, or column of a table, that holds the text
    text_key: str = key("text", common=True)
    # rows to read, by fields or columns: {score: {least: 0.5, below: 0.8}}, {domain: [a.org]},
    # {domain: {not: [a.org]}}
    where: dict[str, Any] = key({})
    # suffixes of further files that are plain text, such as [.log, .nfo]
    suffixes: list[str] = key([], common=True)
    # what to do with text that isn't UTF-8
    undecodable: Literal["skip", "replace", "fail"] = key("skip", common=True)
    empty: Literal["skip", "fail"] = "skip"  # what to do with documents without text
    # what to do with documents longer than max_document_bytes
    long: Literal["keep", "cut", "skip", "fail"] = key("keep", common=True)
    # limit for `long`; required unless it is keep
    max_document_bytes: int | None = key(None, ge=1, common=True)
    # tokenizer.json, Hugging Face directory with one, or bytes (one token per byte); null: train a
    # byte-level BPE
    tokenizer: str | None = key(None, common=True)
    # vocabulary entries, if a tokenizer is trained
    vocab_size: int = key(32_768, ge=257, common=True)
    # token that ends a document; null: the one that the files beside it declare, else a common one
    end_of_text: str | None = None
    # type of the token ids in a flat .bin that is used in place
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = None
    shard_tokens: int = key(1 << 24, ge=1, common=True)  # approximate tokens per tar
    member_tokens: int = key(1 << 20, ge=1)  # tokens per member of a tar
    # fraction of the documents held out for validation
    validation_fraction: float = key(0.01, ge=0, le=0.5, common=True)
    seed: int = key(1337, ge=0, common=True)  # seed for shuffling the documents
    # write the text too, with addresses and scores, as text-*.parquet in the dataset
    parquet: bool = key(False, common=True)
    curate: Curation = section(Curation)
    # number of processes; null: the CPUs available to this process
    workers: int | None = key(None, ge=1, common=True)

    def problems(self) -> Problems:
        problems: Problems = []
        if not self.input:
            problems.append(("input", "is empty", "give a path: forescale shards TEXT output=DIR"))
        if not self.output:
            problems.append(("output", "is empty", "write output=DIR"))
        if self.shard_tokens < self.member_tokens:
            problem = f"{self.shard_tokens} is less than member_tokens={self.member_tokens}"
            problems.append(("shard_tokens", problem, "make it a multiple of member_tokens"))
        if (self.long == "keep") != (self.max_document_bytes is None):
            problem = f"{self.max_document_bytes} doesn't fit long={self.long}"
            todo = "set both max_document_bytes and long (cut, skip or fail), or neither"
            problems.append(("max_document_bytes", problem, todo))
        if not self.tokenizer and "://" in "".join(self.curate.against[:1]):
            todo = "write tokenizer=PATH of a local copy of its tokenizer.json"
            problems.append(("tokenizer", "is required, since curate.against is remote", todo))
        return problems


JOB = ShardsJob
FIRST = ("show",)
EXAMPLES = (
    "shards books/ output=/data/books",
    "shards wiki.jsonl.zst output=w tokenizer=bytes",
    "shards 's3://bucket/web/*.parquet' output=/data/web text_key=content",
    "shards corpus.bin output=/data/web tokenizer=tokenizer.json   (token ids, used in place)",
    "shards show /data/books   (display the contents of a dataset)",
)


def main(arguments: list[str]) -> int:
    """Run the verb; return the exit code."""
    if arguments[:1] == ["show"]:
        return _show(arguments[1:])
    job = parse(ShardsJob, arguments)
    output = output_of(job)
    was_there = (output / MANIFEST).is_file()
    of_tokens = are_tokenised(job.input)
    of_text = {"curate": not job.curate.is_empty, "parquet": job.parquet, "where": job.where}
    if of_tokens and (wrong := next((name for name, does in of_text.items() if does), "")):
        problem = "is for text, and the input is tokenised already"
        raise UserError(wrong, problem, "leave it out, or give the text")
    is_first = os.environ.get("SLURM_PROCID", "0") == "0"  # of the tasks of srun
    with progress_display(10.0 if is_first else 60.0) as progress, _ended_by_signals():
        if of_tokens:
            _index(job, output, progress)
        else:
            curation = None if job.curate.is_empty else job.curate
            source = source_of(job)
            workers = job.workers or available()
            build_dataset(source, output, build_config(job), progress, workers, curation)
    if not is_first:
        return DONE
    dataset = Dataset(output)
    head = "existed already, built from the same request" if was_there else "was built"
    print(
        f"Dataset {dataset.path} {head} (corpus hash {dataset.corpus_hash[:16]}; "
        f"{dataset.vocab_size:,} tokens in the vocabulary):\n"
    )
    print(*summary_lines(dataset.manifest), sep="\n")
    tell(_facts(dataset) | {"existed": was_there})
    print(f"\nNext: forescale train mine data.path={dataset.path}")
    return DONE


def _facts(dataset: Dataset) -> dict[str, Any]:
    splits, counted = dataset.manifest["splits"].items(), ("documents", "tokens", "bytes")
    facts = {"path": dataset.where, "corpus_hash": dataset.corpus_hash, "existed": True}
    return facts | {key: {name: split[key] for name, split in splits} for key in counted}


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End as by Ctrl-C, within the block, at the signals by which SLURM announces an end."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def output_of(job: ShardsJob) -> Path:
    """Return the directory of the dataset. Raises UserError if it holds something else."""
    output = Path(job.output or "").expanduser()
    if output.exists() and not (output / MANIFEST).is_file():
        raise UserError(str(output), "exists and isn't a dataset", "choose another output")
    return output


def source_of(job: ShardsJob) -> Files:
    """Return the documents of the job. Raises UserError if an input isn't there."""
    policy = Policy(job.undecodable, job.empty, job.long, job.max_document_bytes)
    url_key = "" if job.curate.is_empty and not job.parquet else job.curate.url_key
    return Files(job.input, job.text_key, policy, None, job.suffixes, url_key, job.where)


def build_config(job: ShardsJob) -> BuildConfig:
    """Return the builder's configuration for this job."""
    tokenizer, end = job.tokenizer, job.end_of_text
    if tokenizer is None and job.curate.against:  # without it they could not be mixed
        earlier = Dataset(path := str(Path(job.curate.against[0]).expanduser()))
        tokenizer = f"{path}/{TOKENIZER}"
        end = end or earlier.tokenizer.id_to_token(earlier.end_of_text)
    return BuildConfig(
        tokenizer=tokenizer or "bpe",
        vocab_size=job.vocab_size,
        end_of_text=end,
        validation=job.validation_fraction,
        seed=job.seed,
        shard_tokens=job.shard_tokens,
        member_tokens=job.member_tokens,
        parquet=job.parquet,
    )


def are_tokenised(inputs: list[str]) -> bool:
    """Return True if all inputs hold tokens, not text. Raises UserError for a mix of both."""
    from forescale.data.tokenised.inplace import in_place_kind

    kinds = {path: in_place_kind(path) for path in inputs}
    if not any(kinds.values()):
        return False
    if text := [path for path, kind in kinds.items() if kind is None]:
        tokens = next(path for path, kind in kinds.items() if kind)
        problem = f"is text, but {tokens} is tokenised already"
        raise UserError(
            text[0], problem, "build a dataset from each, and mix them with data.sources"
        )
    return True


def _index(job: ShardsJob, output: Path, progress: Any) -> None:
    from forescale.data.tokenised.inplace import index_corpus

    if job.tokenizer is None:
        problem = "is required, because a tokenised corpus doesn't name its tokenizer"
        raise UserError("tokenizer", problem, "write tokenizer=PATH/tokenizer.json")
    index_corpus(
        job.input,
        output,
        job.tokenizer,
        end_of_text=job.end_of_text,
        dtype=job.dtype,
        validation_fraction=job.validation_fraction,
        shard_tokens=job.shard_tokens,
        member_tokens=job.member_tokens,
        progress=progress,
    )
    print("The tokens were not copied: don't move or change the original files.\n")


def _show(arguments: list[str]) -> int:
    """Run `forescale shards show DATASET [windows=N] [sequence_length=N] [seed=N]`."""
    paths = [argument for argument in arguments if "=" not in argument or "://" in argument]
    if len(paths) != 1:
        todo = "write forescale shards show DATASET"
        raise UserError(" ".join(["show", *paths]), "needs exactly one dataset", todo)
    values = dict(_SHOW)
    for argument in arguments:
        name, _, value = argument.partition("=")
        if argument in paths:
            continue
        if name not in values:
            near = nearest_first(name, values)[0]
            raise UserError(name, "isn't a key of shards show", f"did you mean {near}?")
        if not value.isdecimal():
            raise UserError(
                name, f"{value!r} isn't a whole number", f"write such as {name}={_SHOW[name]}"
            )
        values[name] = int(value)
    where = paths[0] if "://" in paths[0] else Path(paths[0]).expanduser()
    if is_json():
        tell(_facts(Dataset(where, cache_directory() / "remote" if "://" in paths[0] else None)))
        return DONE
    print(show(where, **values))
    return DONE
