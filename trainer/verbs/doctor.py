"""`forescale doctor`: a line a finding; exit code 2 where something keeps training from running."""

from forescale.cli import overrides_of
from forescale.config.compose import compose
from forescale.errors import DONE, USER
from forescale.monitor.doctor import examine
from forescale.verbs.jobs import DoctorJob


def main(words: list[str]) -> int:
    job: DoctorJob = compose("doctor", overrides_of("doctor", words))
    counts = {"ok": 0, "note": 0, "fault": 0}
    for found in examine(job):
        counts[found.level] += 1
        mend = f"; {found.mend}" if found.mend else ""
        print(f"{found.level:<5}  {found.name:<10}  {found.what}{mend}.", flush=True)
    if counts["fault"]:
        one = counts["fault"] == 1
        print(f"\n{counts['fault']} fault{'' if one else 's'} to mend before `forescale train`.")
        return USER
    print("\nReady: forescale train")
    return DONE
