"""`forescale shards`: the user's text into a dataset, with an account of what was left out."""

from pathlib import Path

from trainer.cli import overrides_of
from trainer.compose import compose
from trainer.data.build import BuildConfig, build_dataset
from trainer.data.progress import console
from trainer.data.shards import MANIFEST, Dataset
from trainer.data.text import Files
from trainer.errors import DONE, UserError
from trainer.jobs import ShardsJob

_NAMED = 3  # examples of each reason that are printed; manifest.json has up to 200


def main(words: list[str]) -> int:
    job: ShardsJob = compose("shards", overrides_of("shards", words))
    output = Path(job.output or "").expanduser()
    was_there = (output / MANIFEST).is_file()
    if output.exists() and not was_there:
        raise UserError(str(output), "exists, and is not a dataset", "choose another output")
    with console() as progress:
        build_dataset(Files(job.input, job.text_key), output, build_config(job), progress)
    print(_report(Dataset(output), was_there))
    return DONE


def build_config(job: ShardsJob) -> BuildConfig:
    """The job's keys in the builder's words."""
    return BuildConfig(
        tokenizer=job.tokenizer or "bpe",
        vocab_size=job.vocab_size,
        validation=job.validation_fraction,
        seed=job.seed,
        shard_tokens=job.shard_tokens,
        member_tokens=job.member_tokens,
    )


def _report(dataset: Dataset, was_there: bool) -> str:
    head = "was there already, made from the same" if was_there else "is made"
    lines = [
        f"Dataset {dataset.path} {head} (corpus hash {dataset.corpus_hash[:16]}; "
        f"{dataset.vocab_size:,} tokens in the vocabulary):",
        "",
    ]
    for name, split in dataset.manifest["splits"].items():
        tokens, documents, size = (split[k] for k in ("tokens", "documents", "bytes"))
        ratio = f"{size / tokens:.2f} bytes a token" if tokens else "empty"
        lines.append(
            f"  {name:<11} {documents:>10,} documents  {size:>15,} bytes  {tokens:>13,} tokens  "
            f"{ratio}, {_shards(len(split['shards']))}"
        )
    if left_out := dataset.manifest["report"]:
        lines += ["", "Left out, or to be known (more names in manifest.json):"]
        for reason, found in left_out.items():
            names = ", ".join(found["first"][:_NAMED])
            more = ", ..." if found["count"] > _NAMED else ""
            lines.append(f"  {found['count']:>8,}  {reason}: {names}{more}")
    lines += ["", f"Next: forescale train mine data.path={dataset.path}"]
    return "\n".join(lines)


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"
