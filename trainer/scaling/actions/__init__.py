"""The registry of the actions of `forescale study`. Each action is one file.

An action NAME is an entry of ACTIONS and the file study_NAME.py, which defines

    ACTION   its purpose, the keys that it reads (`section.*`: all keys of a section), its examples
    main     takes the composed job, prints, and returns the exit code
    with_arguments   optional: takes the job and the arguments after `--`, and returns the job

Invariant: an action gets only the keys of its ACTION.
"""

import importlib
from types import ModuleType

NAMES = (
    "plan", "launch", "status", "sync", "exclude", "next", "fit", "report", "predict", "compare",
    "rates", "backtest", "score", "records",
)  # fmt: skip
FILES: dict[str, ModuleType] = {
    name: importlib.import_module(f"{__name__}.study_{name}") for name in NAMES
}
ACTIONS = {name: file.ACTION for name, file in FILES.items()}
