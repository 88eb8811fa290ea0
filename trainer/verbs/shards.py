"""`forescale shards`: the user's text into a dataset, with an account of what was left out.

Corpora that are tokenised already are indexed where they lie; `forescale shards show` looks into
what came of it.
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from forescale.config.compose import compose, overrides_of
from forescale.config.job import Job, Problems
from forescale.config.schema import key
from forescale.config.suggest import nearest_first
from forescale.data.dataset import MANIFEST, Dataset
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.pool import available
from forescale.data.prepare.report import printed
from forescale.data.progress import console
from forescale.data.text.documents import Policy
from forescale.data.text.files import Files
from forescale.errors import DONE, UserError

_SHOW = {"windows": 3, "sequence_length": 256, "seed": 0}


@dataclass
class ShardsJob(Job):
    VERB: ClassVar[str] = "shards"
    TARGET: ClassVar[str] = "input"

    input: list[str] = key(
        [], "folders, globs, files, URLs, hf:// data sets; or corpora that are tokenised already"
    )
    output: str | None = key(None, "the directory of the dataset; must not exist yet")
    text_key: str = key("text", "the field of a JSON line or the column that holds the text")
    undecodable: Literal["skip", "replace", "fail"] = key("skip", "text that isn't UTF-8")
    empty: Literal["skip", "fail"] = key("skip", "documents without text")
    long: Literal["keep", "cut", "skip", "fail"] = key(
        "keep", "documents of more than max_document_bytes"
    )
    max_document_bytes: int | None = key(None, "where `long` isn't keep", ge=1)
    tokenizer: str | None = key(
        None,
        "a tokenizer.json, a Hugging Face directory with one, or bytes (one token a byte); "
        "null: train a byte-level BPE",
    )
    vocab_size: int = key(32_768, "entries of a tokenizer that is trained", ge=257)
    end_of_text: str | None = key(None, "the token that ends a document; null: the usual names")
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = key(
        None, "of the tokens in a flat .bin that is used in place"
    )
    shard_tokens: int = key(1 << 24, "tokens a tar, about", ge=1)
    member_tokens: int = key(1 << 20, "tokens a member of a tar", ge=1)
    validation_fraction: float = key(0.01, "share of the documents held out", ge=0, le=0.5)
    seed: int = key(1337, "of the shuffle of documents", ge=0)
    workers: int | None = key(None, "processes; null: the CPUs that this one may use", ge=1)

    def problems(self) -> Problems:
        found: Problems = []
        if not self.input:
            found.append(
                ("input", "names no text", "give a path: forescale shards TEXT output=DIR")
            )
        if not self.output:
            found.append(("output", "names no directory", "write output=DIR"))
        if self.shard_tokens < self.member_tokens:
            what = f"{self.shard_tokens} is less than member_tokens={self.member_tokens}"
            found.append(("shard_tokens", what, "make it a multiple of member_tokens"))
        if (self.long == "keep") != (self.max_document_bytes is None):
            what = f"{self.max_document_bytes} doesn't go with long={self.long}"
            todo = "give both a limit and what happens to longer ones, or neither"
            found.append(("max_document_bytes", what, todo))
        return found


JOB = ShardsJob
EXAMPLES = (
    "shards books/ output=/data/books",
    "shards wiki.jsonl.zst output=w tokenizer=bytes",
    "shards 's3://bucket/web/*.parquet' output=/data/web text_key=content",
    "shards corpus.bin output=/data/web tokenizer=tokenizer.json   (token ids, used in place)",
    "shards show /data/books   (what a dataset holds)",
)


def main(words: list[str]) -> int:
    if words[:1] == ["show"]:
        return _show(words[1:])
    job = compose(ShardsJob, overrides_of(ShardsJob, words))
    output = Path(job.output or "").expanduser()
    was_there = (output / MANIFEST).is_file()
    if output.exists() and not was_there:
        raise UserError(str(output), "exists, and is not a dataset", "choose another output")
    make = _index if _are_tokenised(job.input) else _build
    with console() as progress:
        make(job, output, progress)
    print(_told(Dataset(output), was_there))
    return DONE


def _build(job: ShardsJob, output: Path, progress: Any) -> None:
    policy = Policy(job.undecodable, job.empty, job.long, job.max_document_bytes)
    source = Files(job.input, job.text_key, policy)
    build_dataset(source, output, build_config(job), progress, job.workers or available())


def build_config(job: ShardsJob) -> BuildConfig:
    """The job's keys in the builder's words."""
    return BuildConfig(
        tokenizer=job.tokenizer or "bpe",
        vocab_size=job.vocab_size,
        end_of_text=job.end_of_text,
        validation=job.validation_fraction,
        seed=job.seed,
        shard_tokens=job.shard_tokens,
        member_tokens=job.member_tokens,
    )


def _are_tokenised(inputs: list[str]) -> bool:
    """Whether all inputs hold tokens, not text. Raises UserError for a mix of both."""
    from forescale.data.tokenised.inplace import in_place_kind

    kinds = {path: in_place_kind(path) for path in inputs}
    if not any(kinds.values()):
        return False
    if text := [path for path, kind in kinds.items() if kind is None]:
        tokens = next(path for path, kind in kinds.items() if kind)
        what = f"is text, and {tokens} is tokenised already"
        raise UserError(text[0], what, "make a dataset of each, and mix them with data.sources")
    return True


def _index(job: ShardsJob, output: Path, progress: Any) -> None:
    from forescale.data.tokenised.inplace import index_corpus

    if job.tokenizer is None:
        what = "a corpus that is tokenised already doesn't say by which one"
        raise UserError("tokenizer", what, "give its tokenizer.json")
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
    print("The tokens stay where they are: nothing was copied, so don't move or change them.\n")


def _told(dataset: Dataset, was_there: bool) -> str:
    head = "was there already, made from the same" if was_there else "is made"
    return "\n".join(
        [
            f"Dataset {dataset.path} {head} (corpus hash {dataset.corpus_hash[:16]}; "
            f"{dataset.vocab_size:,} tokens in the vocabulary):",
            "",
            *printed(dataset.manifest),
            "",
            f"Next: forescale train mine data.path={dataset.path}",
        ]
    )


def _show(words: list[str]) -> int:
    """`forescale shards show DATASET [windows=N] [sequence_length=N] [seed=N]`."""
    from forescale.data.show import show

    paths = [word for word in words if "=" not in word or "://" in word]
    if len(paths) != 1:
        todo = "write forescale shards show DATASET"
        raise UserError(" ".join(["show", *paths]), "needs one dataset", todo)
    asked = dict(_SHOW)
    for word in words:
        name, _, value = word.partition("=")
        if word in paths:
            continue
        if name not in asked:
            near = nearest_first(name, asked)[0]
            raise UserError(name, "no such key of shards show", f"the nearest is {near}")
        if not value.isdecimal():
            raise UserError(name, f"{value!r} is no whole number", f"such as {name}={_SHOW[name]}")
        asked[name] = int(value)
    where = paths[0] if "://" in paths[0] else Path(paths[0]).expanduser()
    print(show(where, **asked))
    return DONE
