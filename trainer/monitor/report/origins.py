"""Where runs come from: their configs and how they differ, versions, commits, machines.

Invariant: a table has what the run's files say, with the secrets of addresses masked; nothing is
taken from the machine that draws the page.
"""

from collections.abc import Sequence

from forescale.config.schema import display, flatten, plain
from forescale.ground.errors import UserError, masked
from forescale.ground.storage import read_json
from forescale.monitor.report.tables import ReportedRun, moment
from forescale.pages.document import Cell, Section, code
from forescale.resilience.outcome import launch_of


def differences(runs: Sequence[ReportedRun]) -> Section:
    """Return the keys of the configs that are not the same in all runs, a column each run."""
    section = Section("config", "Config", head=True, columns="words")
    if len(runs) == 1:
        section.absent = "There is one run; name several, and their differences stand here."
        return section
    flat = [dict(flatten(plain(run.status.job), "")) for run in runs]
    names = dict.fromkeys(name for of in flat for name in of)
    rows: list[list[Cell]] = []
    for name in names:
        values = [masked(display(of.get(name))) for of in flat]
        if len(set(values)) > 1:
            rows.append([name, *values])
    if not rows:
        section.absent = "The configs are the same, key by key."
        return section
    section.title = "Config: the keys that differ"
    section.rows = [["key", *(run.label for run in runs)], *rows]
    return section


def environment(runs: Sequence[ReportedRun]) -> Section:
    """Return versions, commits, data and machines of each run."""
    section = Section("environment", "Environment", head=True, columns="words")
    facts = [_environment(run) for run in runs]
    names = dict.fromkeys(name for of in facts for name in of)
    section.rows = [["", *(run.label for run in runs)]]
    section.rows += [[name, *(of.get(name, "-") for of in facts)] for name in names]
    return section


def _environment(run: ReportedRun) -> dict[str, Cell]:
    s = run.status
    facts: dict[str, Cell] = {"directory": str(s.run.path)}
    try:
        stored = read_json(s.run.identity)
    except UserError as e:
        return {**facts, "run.json": str(e)}
    if stored.get("parameters"):
        facts["parameters"] = f"{stored['parameters']:,}"
    facts |= {"device": str(stored.get("device", "-"))}
    starts = [launch_of(a.path) for a in s.attempts]
    starts = [start for start in starts if start]
    if starts:
        hosts = dict.fromkeys(str(start.get("host", "-")) for start in starts)
        ranks = dict.fromkeys(str(start.get("processes", "-")) for start in starts)
        facts["host"] = _few(list(hosts))
        facts["ranks"] = _few(list(ranks))
        jobs = [start["slurm"] for start in starts if isinstance(start.get("slurm"), dict)]
        if jobs:
            nodes = dict.fromkeys(str(node) for job in jobs for node in job.get("nodes", ()))
            facts["SLURM"] = f"jobs {_few([str(job.get('job')) for job in jobs])}"
            facts["nodes"] = _few(list(nodes))
        facts["first start (UTC)"] = moment(starts[0].get("begun"))
    for name, version in stored.get("versions", {}).items():
        facts[name] = str(version)
    git = stored.get("git") or {}
    if "commit" in git:
        changed = ", with changed files" if git.get("changed") == "yes" else ""
        facts["commit of forescale"] = code(git["commit"]) + changed
    if "directory" in git:
        facts["commit of the working directory"] = code(git["directory"])
    data = stored.get("dataset") or {}
    facts["data"] = masked(str(data.get("path", "-")))
    facts["corpus hash"] = str(data.get("corpus_hash", "-"))[:16]
    return facts


def _few(values: Sequence[str]) -> str:
    rest = f" and {len(values) - 4} more" if len(values) > 4 else ""
    return ", ".join(values[:4]) + rest
