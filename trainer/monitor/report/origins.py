"""What made the runs: their configs and how they differ, versions, commits, machines.

Invariant: what a table shows is what the run's own files say, with the secrets of addresses masked;
nothing is taken from the machine that draws the page.
"""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from forescale.config.frozen import freeze
from forescale.config.schema import flatten, plain, shown
from forescale.errors import UserError, masked
from forescale.monitor.report.sections import Cell, Section
from forescale.monitor.report.tables import Shown, moment
from forescale.resilience.outcome import launch_of
from forescale.storage import read_json

_LONGEST = 300  # characters of a value


def configs(runs: Sequence[Shown]) -> list[tuple[str, str]]:
    """Return each run's label and its whole config as YAML."""
    return [(run.label, masked(freeze(run.status.job))) for run in runs]


def differences(runs: Sequence[Shown]) -> Section:
    """Return the keys of the configs that are not the same in all runs, a column each run."""
    made = Section("config", "Config", head=True, columns="words")
    if len(runs) == 1:
        made.absent = "There is one run; name several, and their differences stand here."
        return made
    flat = [dict(flatten(plain(run.status.job), "")) for run in runs]
    names = dict.fromkeys(name for of in flat for name in of)
    rows: list[list[Cell]] = []
    for name in names:
        values = [_cell(of.get(name)) for of in flat]
        if len(set(values)) > 1:
            rows.append([name, *values])
    if not rows:
        made.absent = "The configs are the same, key by key."
        return made
    made.title = "Config: the keys that differ"
    made.rows = [["key", *(run.label for run in runs)], *rows]
    return made


def _cell(value: Any) -> str:
    text = masked(shown(value))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def environment(runs: Sequence[Shown]) -> Section:
    """Return versions, commits, data and machines of each run."""
    made = Section("environment", "Environment", head=True, columns="words")
    found = [_environment(run) for run in runs]
    names = dict.fromkeys(name for of in found for name in of)
    made.rows = [["", *(run.label for run in runs)]]
    made.rows += [[name, *(of.get(name, "-") for of in found)] for name in names]
    return made


def _environment(run: Shown) -> dict[str, Cell]:
    s = run.status
    found: dict[str, Cell] = {"directory": str(s.run.path)}
    try:
        stored = read_json(s.run.identity)
    except UserError as e:
        return {**found, "run.json": str(e)}
    if stored.get("parameters"):
        found["parameters"] = f"{stored['parameters']:,}"
    found |= {"device": str(stored.get("device", "-"))}
    starts = [launch_of(a.path) for a in s.attempts]
    starts = [start for start in starts if start]
    if starts:
        hosts = dict.fromkeys(str(start.get("host", "-")) for start in starts)
        ranks = dict.fromkeys(str(start.get("processes", "-")) for start in starts)
        found["host"] = _few(list(hosts))
        found["ranks"] = _few(list(ranks))
        jobs = [start["slurm"] for start in starts if isinstance(start.get("slurm"), dict)]
        if jobs:
            nodes = dict.fromkeys(str(node) for job in jobs for node in job.get("nodes", ()))
            found["SLURM"] = f"jobs {_few([str(job.get('job')) for job in jobs])}"
            found["nodes"] = _few(list(nodes))
        found["first start (UTC)"] = moment(starts[0].get("begun"))
    for name, version in stored.get("versions", {}).items():
        found[name] = str(version)
    git = stored.get("git") or {}
    if "commit" in git:
        changed = ", with changed files" if git.get("changed") == "yes" else ""
        found["commit of forescale"] = Markup("<code>{}</code>{}").format(git["commit"], changed)
    if "directory" in git:
        found["commit of the working directory"] = Markup("<code>{}</code>").format(
            git["directory"]
        )
    data = stored.get("dataset") or {}
    found["data"] = masked(str(data.get("path", "-")))
    found["corpus hash"] = str(data.get("corpus_hash", "-"))[:16]
    return found


def _few(values: Sequence[str]) -> str:
    more = f" and {len(values) - 4} more" if len(values) > 4 else ""
    return ", ".join(values[:4]) + more
