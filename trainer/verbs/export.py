"""`forescale export`: a checkpoint for `transformers.AutoModelForCausalLM`."""

from pathlib import Path

from forescale.cli import overrides_of
from forescale.config.compose import compose
from forescale.errors import DONE
from forescale.inference.view import open_view
from forescale.verbs.jobs import ExportJob


def main(words: list[str]) -> int:
    job: ExportJob = compose("export", overrides_of("export", words))
    view = open_view(job.target or "", job.run.root)
    from forescale.inference.export import export, family

    architecture = family(view)  # the likeliest refusal, before gigabytes are read
    checkpoint = view.checkpoint(job.step)
    step = checkpoint.position.step
    to = export(view, checkpoint, Path(job.to or f"exports/{view.name}-{step}").expanduser())
    size = sum(path.stat().st_size for path in to.iterdir())
    print(
        f"Run {view.name}, step {step:,}, as {architecture}: {to} ({size / 2**20:,.1f} MiB, fp32)."
        f"\n\nNext, in Python (pip install transformers):\n"
        f"  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"  model = AutoModelForCausalLM.from_pretrained({str(to)!r})\n"
        f"  tokenizer = AutoTokenizer.from_pretrained({str(to)!r})"
    )
    return DONE
