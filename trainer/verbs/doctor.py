"""`forescale doctor`: print one line per finding; exit code 2 if something prevents training."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from forescale.config.compose import parse
from forescale.config.job import Job, RootConfig
from forescale.config.schema import section
from forescale.config.sections.data import CorpusConfig
from forescale.ground.document import tell
from forescale.ground.errors import DONE, USER
from forescale.monitor.doctor import examine


@dataclass
class DoctorJob(Job):
    VERB: ClassVar[str] = "doctor"
    PRINTS: ClassVar = {"faults": int, "findings": list[dict[str, str]]}

    run: RootConfig = section(RootConfig)  # where runs will be stored
    data: CorpusConfig = section(CorpusConfig)  # where the corpus will be stored


JOB = DoctorJob
EXAMPLES = ("doctor",)


def main(words: list[str]) -> int:
    job = parse(DoctorJob, words)
    faults, findings = 0, []
    for finding in examine(Path(job.run.root).expanduser(), job.data):
        findings.append(finding._asdict())
        faults += finding.level == "fault"
        fix = f"; {finding.fix}" if finding.fix else ""
        print(f"{finding.level:<5}  {finding.name:<10}  {finding.text}{fix}.", flush=True)
    verdict = (
        f"{faults} fault{'s' * (faults > 1)} to fix before `forescale train`."
        if faults
        else "Ready: forescale train"
    )
    print(f"\n{verdict}")
    tell({"faults": faults, "findings": findings})
    return USER if faults else DONE
