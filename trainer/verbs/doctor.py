"""`forescale doctor`: print one line per finding, or write them as a page; exit code 2 if
something prevents training."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from forescale.config.compose import parse
from forescale.config.job import Job, Problems, RootConfig
from forescale.config.schema import section
from forescale.config.sections.data import CorpusConfig
from forescale.ground.errors import DONE, USER
from forescale.ground.storage import write_output
from forescale.monitor.doctor import Finding, examine, page


@dataclass
class DoctorJob(Job):
    VERB: ClassVar[str] = "doctor"

    run: RootConfig = section(RootConfig)  # where runs will be stored
    data: CorpusConfig = section(CorpusConfig)  # where the corpus will be stored
    output: str | None = None  # an HTML file to write beside, for whoever helps with a fault

    def problems(self) -> Problems:
        """Return the problem of the output, if any."""
        if self.output is None or Path(self.output).suffix == ".html":
            return []
        return [("output", f"{self.output} is no page", "name a file, such as output=doctor.html")]


JOB = DoctorJob
EXAMPLES = ("doctor", "doctor output=doctor.html")


def main(words: list[str]) -> int:
    job = parse(DoctorJob, words)
    findings: list[Finding] = []
    for finding in examine(Path(job.run.root).expanduser(), job.data):
        findings.append(finding)
        fix = f"; {finding.fix}" if finding.fix else ""
        print(f"{finding.level:<5}  {finding.name:<10}  {finding.text}{fix}.", flush=True)
    faults = sum(finding.level == "fault" for finding in findings)
    verdict = (
        f"{faults} fault{'s' * (faults > 1)} to fix before `forescale train`."
        if faults
        else "Ready: forescale train"
    )
    print(f"\n{verdict}")
    if job.output is not None:
        write_output(Path(job.output).expanduser(), page(findings, verdict).encode())
    return USER if faults else DONE
