"""`forescale export`: write a checkpoint for `transformers.AutoModelForCausalLM`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from forescale.config.compose import compose, overrides_of
from forescale.config.job import RunJob
from forescale.config.schema import key
from forescale.errors import DONE
from forescale.inference.view import open_view


@dataclass
class ExportJob(RunJob):
    """A checkpoint and where to write it."""

    VERB: ClassVar[str] = "export"

    target: str | None = key(None, "a run (its name or its directory) or a checkpoint")
    step: int | None = key(None, "the checkpoint of this step; null: the newest", ge=0)
    to: str | None = key(None, "the directory to write; null: exports/RUN-STEP")


JOB = ExportJob
EXAMPLES = ("export first to=exports/first",)


def main(arguments: list[str]) -> int:
    """Write the directory, and print how to load it."""
    job = compose(ExportJob, overrides_of(ExportJob, arguments))
    view = open_view(job.target or "", job.run.root)
    from forescale.inference.export import export, family

    architecture = family(view)  # refuse here, before gigabytes are read
    checkpoint = view.checkpoint(job.step)
    step = checkpoint.position.step
    to = export(view, checkpoint, Path(job.to or f"exports/{view.name}-{step}").expanduser())
    size = sum(path.stat().st_size for path in to.iterdir())
    if later := getattr(view.config.model, "mtp_layers", 0):
        print(f"Left out: model.mtp_layers={later}, which predict later tokens in training alone.")
    print(
        f"Run {view.name}, step {step:,}, as {architecture}: {to} ({size / 2**20:,.1f} MiB, fp32)."
        f"\n\nNext, in Python (pip install transformers):\n"
        f"  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"  model = AutoModelForCausalLM.from_pretrained({str(to)!r})\n"
        f"  tokenizer = AutoTokenizer.from_pretrained({str(to)!r})"
    )
    return DONE
