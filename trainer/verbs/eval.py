"""`forescale eval`: what a trained model's loss is on a dataset, beside what compressors need."""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from forescale.checkpoint.reader import Position
from forescale.config.compose import compose, overrides_of
from forescale.config.data import CorpusConfig
from forescale.config.job import RunJob
from forescale.config.schema import key, section
from forescale.data.dataset import Dataset
from forescale.data.prepare import baselines
from forescale.data.progress import console
from forescale.errors import DONE
from forescale.inference.view import RunView, open_view

if TYPE_CHECKING:
    from forescale.train.evaluate import Score


@dataclass
class EvalJob(RunJob):
    VERB: ClassVar[str] = "eval"

    target: str | None = key(None, "a run (its name or its directory) or a checkpoint")
    step: int | None = key(None, "the checkpoint at this step; null: the newest", ge=0)
    split: Literal["train", "validation"] = key("validation", "which part of the dataset")
    windows: int | None = key(None, "so many windows, evenly spread over it; null: all", ge=1)
    micro_batch: int = key(8, "windows at once", ge=1)
    trust: bool = key(False, "run the class that the run's config names as its model's _target_")
    data: CorpusConfig = section(
        CorpusConfig, "what it is scored on; null: what the run trained on"
    )


JOB = EvalJob
EXAMPLES = (
    "eval first",
    "eval first data.path=/data/books",
)


def main(words: list[str]) -> int:
    job = compose(EvalJob, overrides_of(EvalJob, words))
    view = open_view(job.target or "", job.run.root)
    checkpoint = view.checkpoint(job.step)
    from forescale.inference.device import best_device
    from forescale.inference.scoring import datasets_of, score

    datasets = datasets_of(view, job.data)
    model = view.load(checkpoint, job.trust).to(best_device())
    for dataset in datasets.values():
        with console() as progress:
            found = score(
                model,
                dataset,
                job.split,
                sequence_length=view.config.train.sequence_length,
                micro_batch=job.micro_batch,
                windows=job.windows,
                documents=view.config.data.document_mask,
                progress=progress,
            )
        _print(job, view, checkpoint.position, dataset, found)
    return DONE


def _print(
    job: EvalJob, view: RunView, position: Position, dataset: Dataset, found: "Score"
) -> None:
    part = "" if job.windows is None else f", {found.windows:,} windows spread over it"
    print(
        f"Run {view.name}, step {position.step:,} ({position.tokens:,} tokens), in fp32, on the "
        f"{job.split} split of {dataset.where}{part}\n"
        f"(corpus hash {dataset.corpus_hash[:16]}{_seen(view, dataset, job.split)}):\n\n"
        f"  bits per byte  {found.bits_per_byte:.4f}\n"
        f"  loss           {found.loss:.4f} ± {found.loss_stderr:.4f} nats a token\n"
        f"  perplexity     {found.perplexity:.2f} (only comparable under this tokenizer)\n"
        f"  tokens         {found.targets:,}\n"
        f"  bytes          {found.bytes:,}"
    )
    if job.split == "validation" and (others := baselines.bits_per_byte(dataset.manifest)):
        print("\nCompressors over the whole split, in bits per byte:\n")
        widest = max(map(len, others))
        for name, bits in others.items():
            compared = bits and job.windows is None  # over the same bytes
            ratio = f"   the model needs {found.bits_per_byte / bits:.3f} of it" if compared else ""
            print(f"  {name:<{widest}}  {bits:.4f}{ratio}")


def _seen(view: RunView, dataset: Dataset, split: str) -> str:
    """How this dataset stands to what the run was trained on."""
    known = view.identity["dataset"]["sources"].values()
    if dataset.identity not in [source["identity"] for source in known]:
        return "; not what the run was trained on"
    return "; the run was trained on this split" if split == "train" else ""
