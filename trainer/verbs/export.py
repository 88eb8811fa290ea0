"""`forescale export`: write a checkpoint for `transformers.AutoModelForCausalLM`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from forescale.config.compose import parse
from forescale.config.job import Problems, RunJob
from forescale.config.schema import key
from forescale.ground.document import tell
from forescale.ground.errors import DONE
from forescale.inference.view import RunView, open_view

if TYPE_CHECKING:
    from forescale.checkpoint.reader import Checkpoint


@dataclass
class ExportJob(RunJob):
    """A checkpoint and where to write it."""

    VERB: ClassVar[str] = "export"
    PRINTS: ClassVar = {"path": str, "run": str, "step": int, "kind": str, "bytes": int}

    target: str | None = None  # a run (its name or its directory) or a checkpoint
    step: int | None = key(None, ge=0)  # the checkpoint of this step; null: the newest
    to: str | None = None  # the directory to write; null: exports/RUN-STEP
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # number format of the exported weights
    # write the adapters of a LoRA run alone, for peft; false: merge them into the weights
    adapter: bool = False
    # adapter=true: the exported base model that peft loads; null: exports/FROM-STEP
    base: str | None = None

    def problems(self) -> Problems:
        problems = super().problems()
        if self.base is not None and not self.adapter:
            problems.append(("base", "applies to adapters alone", "add adapter=true"))
        return problems


JOB = ExportJob
EXAMPLES = (
    "export first to=exports/first",
    "export first dtype=bf16",
    "export first-questions adapter=true",
)


def main(arguments: list[str]) -> int:
    """Write the directory, and print how to load it."""
    job = parse(ExportJob, arguments)
    view = open_view(job.target or "", job.run.root)
    from forescale.inference.export import MODELING, export, family

    architecture = family(view)  # refuse here, before gigabytes are read
    checkpoint = view.checkpoint(job.step)
    step = checkpoint.position.step
    if job.adapter:
        _export_adapters(job, view, checkpoint)
        return DONE
    to = Path(job.to or f"exports/{view.name}-{step}").expanduser()
    export(view, checkpoint, to, job.dtype)
    size = sum(path.stat().st_size for path in to.iterdir())
    tell({"path": to, "run": view.name, "step": step, "kind": "model", "bytes": size})
    if later := getattr(view.config.model, "mtp_layers", 0):
        print(f"Left out: model.mtp_layers={later}, which predict later tokens in training alone.")
    trusts = ", trust_remote_code=True" if (to / MODELING).exists() else ""
    print(
        f"Run {view.name}, step {step:,}, as {architecture}: {to} ({size / 2**20:,.1f} MiB, "
        f"{job.dtype}).\n\nNext, in Python (pip install transformers):\n"
        f"  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"  model = AutoModelForCausalLM.from_pretrained({str(to)!r}{_as_written(job)}{trusts})\n"
        f"  tokenizer = AutoTokenizer.from_pretrained({str(to)!r}{trusts})"
    )
    return DONE


def _export_adapters(job: ExportJob, view: RunView, checkpoint: "Checkpoint") -> None:
    from forescale.inference.export import export_adapters

    step, origin = checkpoint.position.step, view.config.run.origin
    name = Path(origin.run or "").name
    base = job.base or f"exports/{name}-{origin.step}"
    to = Path(job.to or f"exports/{view.name}-{step}-adapter").expanduser()
    export_adapters(view, checkpoint, to, base, job.dtype)
    size = sum(path.stat().st_size for path in to.iterdir())
    tell({"path": to, "run": view.name, "step": step, "kind": "adapters", "bytes": size})
    dtype = "" if job.dtype == "fp32" else f" dtype={job.dtype}"
    print(
        f"Adapters of run {view.name}, step {step:,}: {to} ({size / 2**20:,.1f} MiB, "
        f"{job.dtype}).\n\nNext:\n"
        f"  forescale export {origin.run} step={origin.step} to={base}{dtype}\n"
        f"and in Python (pip install transformers peft):\n"
        f"  from peft import PeftModel\n"
        f"  from transformers import AutoModelForCausalLM\n"
        f"  base = AutoModelForCausalLM.from_pretrained({base!r}{_as_written(job)})\n"
        f"  model = PeftModel.from_pretrained(base, {str(to)!r})"
    )


def _as_written(job: ExportJob) -> str:
    """Return the argument without which transformers 4 reads all weights as fp32."""
    return "" if job.dtype == "fp32" else ', dtype="auto"'
