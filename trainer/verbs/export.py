"""`forescale export`: write a checkpoint for `transformers.AutoModelForCausalLM`, or llama.cpp."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from forescale.config.compose import parse
from forescale.config.job import Problems, RunJob
from forescale.config.schema import key
from forescale.ground.document import tell
from forescale.ground.errors import DONE, UserError
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
    # the directory to write, or of format=gguf the file; null: exports/RUN-STEP or RUN-STEP.gguf
    to: str | None = None
    format: Literal["transformers", "gguf"] = "transformers"  # gguf: one file, for llama.cpp
    # number format of the exported weights; q8_0, of a GGUF file alone: 8 bits and a scale for 32
    dtype: Literal["fp32", "bf16", "fp16", "q8_0"] = "fp32"
    licence: str | None = None  # SPDX name of the weights' licence for the model card: apache-2.0
    # files of `forescale eval RUN --json`, whose scores the model card has
    scores: list[str] = field(default_factory=list)
    # write the adapters of a LoRA run alone, for peft; false: merge them into the weights
    adapter: bool = False
    # adapter=true: the exported base model that peft loads; null: exports/FROM-STEP
    base: str | None = None

    def problems(self) -> Problems:
        problems = super().problems()
        if self.base is not None and not self.adapter:
            problems.append(("base", "applies to adapters alone", "add adapter=true"))
        if self.dtype == "q8_0" and self.format != "gguf":
            problems.append(("dtype", "q8_0 exists only in GGUF files", "add format=gguf"))
        if self.adapter and self.format == "gguf":
            todo = "leave adapter out: the file then has them merged into the weights"
            problems.append(("format", "a GGUF file can't hold adapters only", todo))
        if self.adapter or self.format == "gguf":
            wrong = "belongs into the model card, which only a whole directory has"
            named = {"licence": self.licence, "scores": self.scores}
            problems += [(key, wrong, "leave it out") for key, value in named.items() if value]
        return problems


JOB = ExportJob
EXAMPLES = (
    "export first to=exports/first",
    "export first dtype=bf16",
    "export first licence=apache-2.0 scores=[scores.jsonl]   (facts for its model card)",
    "export mine format=gguf dtype=q8_0   (for llama.cpp: llama-cli -m exports/mine-1000.gguf)",
    "export first-questions adapter=true",
)


def main(arguments: list[str]) -> int:
    """Write the directory, and print how to load it."""
    job = parse(ExportJob, arguments)
    view = open_view(job.target or "", job.run.root)
    from forescale.inference.export import MODELING, auto_of, export, export_gguf, family

    architecture = family(view)  # refuse here, before gigabytes are read
    checkpoint = view.checkpoint(job.step)
    step = checkpoint.position.step
    if job.adapter:
        _export_adapters(job, view, checkpoint)
        return DONE
    if job.format == "gguf":
        to = Path(job.to or f"exports/{view.name}-{step}.gguf").expanduser()
        export_gguf(view, checkpoint, to, job.dtype)
        size = to.stat().st_size
        tell({"path": to, "run": view.name, "step": step, "kind": "gguf", "bytes": size})
        text = f"Run {view.name}, step {step:,}, as {architecture} for llama.cpp: {to} "
        print(text + f"({size / 2**20:,.1f} MiB, {job.dtype}).\n\nNext:\n  llama-cli -m {to}")
        return DONE
    to = Path(job.to or f"exports/{view.name}-{step}").expanduser()
    export(view, checkpoint, to, job.dtype, _card(job, view, checkpoint, architecture))
    size = sum(path.stat().st_size for path in to.iterdir())
    tell({"path": to, "run": view.name, "step": step, "kind": "model", "bytes": size})
    if later := getattr(view.config.model, "mtp_layers", 0):
        print(f"Left out: model.mtp_layers={later}, which predict later tokens in training alone.")
    auto = auto_of(view)
    trusts = ", trust_remote_code=True" if (to / MODELING).exists() else ""
    print(
        f"Run {view.name}, step {step:,}, as {architecture}: {to} ({size / 2**20:,.1f} MiB, "
        f"{job.dtype}).\n\nNext, in Python (pip install transformers):\n"
        f"  from transformers import {auto}, AutoTokenizer\n"
        f"  model = {auto}.from_pretrained({str(to)!r}{_as_written(job)}{trusts})\n"
        f"  tokenizer = AutoTokenizer.from_pretrained({str(to)!r}{trusts})"
    )
    return DONE


def _card(
    job: ExportJob, view: RunView, checkpoint: "Checkpoint", architecture: str
) -> dict[str, bytes]:
    """Return the model card and its picture, by file name."""
    from forescale.inference.card import CARD, PICTURE, card

    files: dict[str, bytes] = {}
    if view.run.metrics.is_file():
        from forescale.monitor.report.loss_picture import picture  # imports matplotlib

        with suppress(UserError):  # it has made no step
            files[PICTURE] = picture([view.run], "tokens", "svg")
    text = card(
        view, checkpoint, architecture, job.dtype,
        licence=job.licence, scores=[*map(Path, job.scores)], has_picture=bool(files),
    )  # fmt: skip
    return {CARD: text.encode(), **files}


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
