"""`forescale doctor`: a line a finding; exit code 2 where something keeps training from running."""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from forescale.config.compose import compose, overrides_of
from forescale.config.data import CorpusConfig
from forescale.config.job import Job, RootConfig
from forescale.config.schema import section
from forescale.errors import DONE, USER
from forescale.monitor.doctor import examine


@dataclass
class DoctorJob(Job):
    VERB: ClassVar[str] = "doctor"

    run: RootConfig = section(RootConfig, "where the runs would live")
    data: CorpusConfig = section(CorpusConfig, "where the corpus would be kept")


JOB = DoctorJob
EXAMPLES = ("doctor",)


def main(words: list[str]) -> int:
    job = compose(DoctorJob, overrides_of(DoctorJob, words))
    counts = {"ok": 0, "note": 0, "fault": 0}
    for found in examine(Path(job.run.root).expanduser(), job.data):
        counts[found.level] += 1
        mend = f"; {found.mend}" if found.mend else ""
        print(f"{found.level:<5}  {found.name:<10}  {found.what}{mend}.", flush=True)
    if counts["fault"]:
        one = counts["fault"] == 1
        print(f"\n{counts['fault']} fault{'' if one else 's'} to mend before `forescale train`.")
        return USER
    print("\nReady: forescale train")
    return DONE
