"""`forescale doctor`: print one line per finding; exit code 2 if something prevents training."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from forescale.config.compose import parse
from forescale.config.job import Job, RootConfig
from forescale.config.schema import section
from forescale.config.sections.data import CorpusConfig
from forescale.ground.errors import DONE, USER
from forescale.monitor.doctor import examine


@dataclass
class DoctorJob(Job):
    VERB: ClassVar[str] = "doctor"

    run: RootConfig = section(RootConfig)  # where runs will be stored
    data: CorpusConfig = section(CorpusConfig)  # where the corpus will be stored


JOB = DoctorJob
EXAMPLES = ("doctor",)


def main(words: list[str]) -> int:
    job = parse(DoctorJob, words)
    faults = 0
    for finding in examine(Path(job.run.root).expanduser(), job.data):
        faults += finding.level == "fault"
        fix = f"; {finding.fix}" if finding.fix else ""
        print(f"{finding.level:<5}  {finding.name:<10}  {finding.text}{fix}.", flush=True)
    verdict = (
        f"{faults} fault{'s' * (faults > 1)} to fix before `forescale train`."
        if faults
        else "Ready: forescale train"
    )
    print(f"\n{verdict}")
    return USER if faults else DONE
