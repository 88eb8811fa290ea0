"""The problems that DeepSpeed itself has with the settings of `engine.deepspeed`.

DeepSpeed's config object is built of them, as ranks will build it. It ignores a key that it doesn't
know, and keeps many values unread until a rank uses them. So it gets a dictionary that records
which keys it looks up, and with which defaults. What no part of DeepSpeed looks up is unknown, and
a value of another type than its default is wrong. Sections that DeepSpeed hands to a class of
pydantic as a whole are checked by that class.

Invariant: `problems_apart` imports neither torch nor DeepSpeed, prints nothing of theirs, and
starts a process only where `engine.deepspeed` has settings.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from forescale.config.schema import Problem, flatten
from forescale.config.suggest import meant
from forescale.engine.deepspeed_config import deepspeed_config, merged
from forescale.ground.errors import UserError, shortened

_KEY = "engine.deepspeed"
_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def problems_apart(job, world_size: int) -> list[Problem]:
    """Return what DeepSpeed refuses in a TrainJob's `engine.deepspeed`, from a process of its own.

    Raises UserError if DeepSpeed can't be asked here.
    """
    settings = job.engine.deepspeed
    if not settings:
        return []
    return _answer(json.dumps([_base(job, world_size), settings]))


def problems_here(job, world_size: int) -> list[Problem]:
    """Return the same. Imports DeepSpeed."""
    settings = job.engine.deepspeed
    if not settings:
        return []
    return [*_problems(_base(job, world_size), settings)]


def _base(job, world_size: int) -> dict[str, Any]:
    """Return the JSON of a job without its `engine.deepspeed`, for any number of ranks."""
    base = deepspeed_config(replace(job, engine=replace(job.engine, deepspeed={})), world_size)
    del base["train_batch_size"]  # DeepSpeed would compare it with the ranks that have joined here
    return base | {"train_micro_batch_size_per_gpu": 1}


@cache  # a study plans many runs with the same settings
def _answer(request: str) -> list[Problem]:
    command = [sys.executable, "-P", "-m", __name__]
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        problem = f"can't be checked, because DeepSpeed doesn't start here ({shortened(why, 200)})"
        raise UserError(_KEY, problem, f"see what {sys.executable} -c 'import deepspeed' prints")
    return [Problem(*fields) for fields in json.loads(done.stdout)]


class _RecordingDict(dict[str, Any]):
    """A section of settings that records which of its keys are looked up, and their defaults."""

    def __init__(self, section: dict[str, Any]):
        super().__init__(
            (k, _RecordingDict(v) if isinstance(v, dict) else v) for k, v in section.items()
        )
        self.defaults: dict[str, Any] = {}  # of the keys that were looked up
        self.is_unpacked = False

    def get(self, key: str, default: Any = None) -> Any:
        self.defaults[key] = default
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.defaults.setdefault(key, None)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.defaults.setdefault(str(key), None)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self.is_unpacked = True
        return super().__iter__()

    def keys(self) -> Any:
        return self  # searched and unpacked as a dictionary's keys are

    def items(self) -> Any:
        self.is_unpacked = True
        return super().items()

    def __copy__(self) -> "_RecordingDict":
        return self

    def fault(self, path: list[str]) -> tuple[str, str, str] | None:
        """Return the key, the problem and the remedy of a setting; None if it is well."""
        section = self
        for depth, name in enumerate(path):
            where, value = ".".join(path[: depth + 1]), dict.get(section, name)
            if section.is_unpacked or not section.defaults:
                return None  # a class of pydantic has checked it, and what lies below
            if name not in section.defaults:
                near = meant(name, section.defaults)
                todo = f"did you mean {near}?" if near else "leave it out"
                return where, "is a setting that DeepSpeed doesn't have", todo
            default = section.defaults[name]
            if not isinstance(value, _RecordingDict):
                expected = _TYPES.get(type(default))
                allowed = (int, float) if type(default) is float else type(default)
                is_bool = isinstance(value, bool) == isinstance(default, bool)
                if expected and value is not None and not (isinstance(value, allowed) and is_bool):
                    problem = f"expects {expected}, got {shortened(repr(value), 80)}"
                    return where, problem, f"its default is {json.dumps(default)}"
                return None
            section = value
        return None


def _problems(base: dict[str, Any], settings: dict[str, Any]) -> Iterator[Problem]:
    """Yield the problems of settings on top of DeepSpeed's JSON; imports DeepSpeed."""
    config = _RecordingDict(merged(base, settings))
    whole = _refusal(config)
    is_blamed = False
    for path, value in flatten(settings, ""):
        names, alone = path.split("."), config
        if whole:  # which of them is it?
            part = value
            for name in reversed(names):
                part = {name: part}
            alone = _RecordingDict(merged(base, part))
        refusal = _refusal(alone) if whole else None
        fault = (path, refusal, "correct it, or leave it out") if refusal else alone.fault(names)
        if fault:
            is_blamed = is_blamed or bool(refusal)
            yield Problem(f"{_KEY}.{fault[0]}", *fault[1:])
    if whole and not is_blamed:
        yield Problem(_KEY, whole, "correct it, or leave it out")


def _refusal(config: dict[str, Any]) -> str | None:
    """Return why DeepSpeed refuses a config, or None."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(config)
        return None
    except ValidationError as e:
        first = e.errors()[0]
        if first["type"] == "extra_forbidden":
            return "is a setting that DeepSpeed doesn't have"
        text = first["msg"]
    except Exception as e:  # assertions, ValueError and whatever a value of another type leads to
        text = str(e) or repr(e)
    text = " ".join(text.split()).rstrip(".")
    return f"is refused by DeepSpeed: {shortened(text, 300)}"


def _main() -> None:
    """Answer the request on standard input with the problems, as JSON on standard output."""
    answer = os.dup(1)
    os.dup2(2, 1)  # DeepSpeed prints
    import deepspeed  # noqa: F401

    text = json.dumps([*_problems(*json.load(sys.stdin))])
    with open(answer, "w") as f:
        f.write(text)


if __name__ == "__main__":
    _main()
