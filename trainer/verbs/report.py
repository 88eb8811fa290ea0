"""`forescale report`: the curves of runs, and all about them, as one HTML file; or a picture.
Of a curated dataset: what its curation did."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from forescale.config.compose import parse
from forescale.config.job import Job, Problems, RootConfig
from forescale.config.schema import key, section
from forescale.data.dataset import MANIFEST, Dataset
from forescale.ground.document import tell
from forescale.ground.errors import DONE, UserError
from forescale.ground.storage import write_output
from forescale.monitor.report.html import distinct, page
from forescale.run.directory import Run

_KINDS = (".html", ".svg", ".png")


@dataclass
class ReportJob(Job):
    VERB: ClassVar[str] = "report"
    TARGET: ClassVar[str] = "input"
    PRINTS: ClassVar = {"file": str, "of": list[str]}

    # runs (names or directories), drawn into one chart; or the directory of one curated dataset
    input: list[str] = key([])
    # the file to write: .html is the page, .svg or .png the loss alone; null: report-RUN.html here
    output: str | None = None
    # horizontal axis of the curves; the page can change it
    x: Literal["step", "tokens", "flops", "time"] = "tokens"
    run: RootConfig = section(RootConfig)  # where runs are looked for

    def problems(self) -> Problems:
        problems: Problems = []
        if not self.input:
            problems.append(("input", "is missing", "name a run or more: forescale report first"))
        if self.output is not None and Path(self.output).suffix.lower() not in _KINDS:
            todo = "end it with .html (the page), .svg or .png (the loss)"
            problems.append(("output", f"{self.output} has no ending that names a format", todo))
        return problems


JOB = ReportJob
EXAMPLES = (
    "report /data/web   (what its curation kept and dropped)",
    "report first",
    "report first second x=flops",
    "report first output=loss.svg",
)


def main(words: list[str]) -> int:
    """Write the file, and print where it is."""
    job = parse(ReportJob, words)
    if is_dataset(job.input):
        return _of_dataset(Path(job.input[0]).expanduser(), job.output)
    runs = distinct([Run.existing(name, job.run.root) for name in job.input])
    others = f"-and-{len(runs) - 1}-more" if len(runs) > 1 else ""
    named = f"report-{runs[0].path.resolve().name}{others}.html"
    path = Path(job.output or named).expanduser()
    form = path.suffix.lower()
    if form == ".html":
        data = page(runs, job.x, ["forescale", "report", *words]).encode()
    else:
        from forescale.monitor.report.loss_picture import picture  # imports matplotlib

        data = picture(runs, job.x, form[1:])
    write_output(path, data)
    tell({"file": path, "of": [run.path for run in runs]})
    hint = "open it in a browser; it needs no network" if form == ".html" else "the loss"
    print(f"{path}: {', '.join(run.name for run in runs)}; {hint}.")
    return DONE


def is_dataset(inputs: list[str]) -> bool:
    """Return True if the inputs are one directory that holds a dataset."""
    return len(inputs) == 1 and (Path(inputs[0]).expanduser() / MANIFEST).is_file()


def _of_dataset(path: Path, output: str | None) -> int:
    """Write the page of a dataset's curation, and print where it is."""
    from forescale.monitor.report.curation import page as curation_page

    target = Path(output or f"report-{path.resolve().name}.html").expanduser()
    if target.suffix.lower() != ".html":
        raise UserError(f"output={output}", "a curation is a page", "end it with .html")
    write_output(target, curation_page(Dataset(path)).encode())
    tell({"file": target, "of": [path]})
    print(f"{target}: the curation of {path}; open it in a browser; it needs no network.")
    return DONE
