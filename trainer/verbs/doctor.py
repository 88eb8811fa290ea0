"""`forescale doctor`: print one line per finding; exit code 2 if something prevents training."""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from forescale.config.compose import compose, overrides_of
from forescale.config.job import Job, RootConfig
from forescale.config.schema import section
from forescale.config.sections.data import CorpusConfig
from forescale.ground.errors import DONE, USER
from forescale.monitor.doctor import examine


@dataclass
class DoctorJob(Job):
    VERB: ClassVar[str] = "doctor"

    run: RootConfig = section(RootConfig, "where runs will be stored")
    data: CorpusConfig = section(CorpusConfig, "where the corpus will be stored")


JOB = DoctorJob
EXAMPLES = ("doctor",)


def main(words: list[str]) -> int:
    job = compose(DoctorJob, overrides_of(DoctorJob, words))
    counts = {"ok": 0, "note": 0, "fault": 0}
    for finding in examine(Path(job.run.root).expanduser(), job.data):
        counts[finding.level] += 1
        fix = f"; {finding.fix}" if finding.fix else ""
        print(f"{finding.level:<5}  {finding.name:<10}  {finding.text}{fix}.", flush=True)
    if counts["fault"]:
        one = counts["fault"] == 1
        print(f"\n{counts['fault']} fault{'' if one else 's'} to fix before `forescale train`.")
        return USER
    print("\nReady: forescale train")
    return DONE
