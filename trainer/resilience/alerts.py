"""Tells a service of the user's own that a run has ended: that it is complete, gave up, or stopped
by a guard or a wrong input.

    FORESCALE_WEBHOOK=https://...   gets a POST of JSON: text (a sentence; Slack, Mattermost and
                                    Teams show it), content (the same, for Discord), run, event and
                                    code

Invariant: no run depends on it: one try, and a failure is a line in the log. The address is a
secret: it stands in the environment, and in no config, log or file of a run.
"""

import json
import os
import urllib.request
from collections.abc import Callable
from http.client import HTTPException

from forescale.errors import CRASHED, DONE, GAVE_UP, USER
from forescale.run.directory import Run

VARIABLE = "FORESCALE_WEBHOOK"
EVENTS = {DONE: "complete", CRASHED: "crashed", USER: "stopped", GAVE_UP: "gave up"}
_SECONDS = 10.0


def tell(run: Run, code: int, why: str, report: Callable[[str], object]) -> None:
    """Send the end of a run, if the environment says where to. why: a sentence; report: prints a
    line. An interrupted run, which resumes, is not told of."""
    address = os.environ.get(VARIABLE)
    if not address or (event := EVENTS.get(code)) is None:
        return
    text = f"forescale run {run.name}: {event}. {why}"
    facts = {"text": text, "content": text, "run": run.name, "event": event, "code": code}
    try:
        if not address.startswith(("https://", "http://")):
            raise ValueError("its address doesn't begin with https://")
        headers = {"Content-Type": "application/json", "User-Agent": "forescale"}
        request = urllib.request.Request(address, json.dumps(facts).encode(), headers)
        urllib.request.urlopen(request, timeout=_SECONDS).close()
    except (OSError, ValueError, HTTPException) as e:
        problem = str(e).replace(address, "the address")
        report(f"The webhook of {VARIABLE} could not be told: {problem}. The run is not affected.")
