"""The command line: `forescale VERB [TARGET] [KEY=VALUE ...] [--FLAG]` runs a verb.

Invariant: a problem of the user's ends with one sentence and code 2, without a traceback. A bug of
this project keeps its traceback and ends with code 1. With --json, which every verb takes, both are
the object `error` of the document, too (ground/document.py).
"""

if __name__ == "__main__":  # `python -m forescale.cli` is `python -m forescale`, which ends here
    import runpy

    runpy.run_module("forescale", run_name="__main__")

import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from forescale.ground.console import visible_output
from forescale.ground.document import for_programs, is_json, taken_from, tell
from forescale.ground.errors import CRASHED, DONE, INTERRUPTED, UserError, storage_error
from forescale.verbs import VERBS, help_page, load

_NO_HOME = "Could not determine home directory."  # all that pathlib says of ~nobody
_python_warning = warnings.formatwarning
# What only some verbs import, and the extra of pyproject.toml that installs it.
_EXTRAS = {"pandas": "study", "scipy": "study", "lm_eval": "harness"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: sys.argv) and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    warnings.formatwarning = _warning
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Also in a pipe or a log file, lines of stdout and stderr keep the order of printing. What
        # the locale can't show is an escape, and no error.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    words, asks = taken_from(words)
    with visible_output(), for_programs(asks):
        return _run(words)


def _run(words: list[str]) -> int:
    verb = next(iter(words), "")
    try:
        return _dispatch(words)
    except BrokenPipeError:  # the reader of a pipe has closed it: no error, but a training stops
        if not is_json():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED if verb == "train" else DONE
    except KeyboardInterrupt:
        print("forescale: interrupted; run the same command again to resume.", file=sys.stderr)
        error = UserError(verb, "interrupted", "run the same command again to resume")
        return _failed(verb, error, INTERRUPTED)
    except Exception as e:
        if (known := _sentence(verb, e)) is None:
            bug = f"{type(e).__name__}: {e}"
            _failed(verb, UserError(verb, bug, "see its traceback on standard error"), CRASHED)
            raise
        print(f"forescale: {known}", file=sys.stderr)
        return _failed(verb, known, known.code)


def _failed(verb: str, error: UserError, code: int) -> int:
    """Tell programs of an error; return the exit code."""
    tell({"error": {"verb": verb, **error.facts(), "exit_code": code}})
    return code


def _sentence(verb: str, e: Exception) -> UserError | None:
    """Return what the user can do about an exception; None: it is a bug of this project."""
    if isinstance(e, UserError):
        return e
    if isinstance(e, ModuleNotFoundError):
        name = (e.name or "").partition(".")[0]
        todo = f"pip install 'forescale[{_EXTRAS.get(name)}]'"
        needs = f"needs {name}, which isn't installed"
        return UserError(f"forescale {verb}", needs, todo) if name in _EXTRAS else None
    if isinstance(e, RuntimeError):
        problem = "a path begins with ~ and a name that is no user's"
        return UserError(verb, problem, "write the full path") if str(e) == _NO_HOME else None
    if isinstance(e, MemoryError):
        if verb == "train" and "RANK" in os.environ:  # others may have taken it: tried again
            return None
        problem = f"not enough memory ({' '.join(str(e).split()) or 'of this process'})"
        return UserError(verb, problem, "make what you gave smaller")
    return storage_error(e) if isinstance(e, OSError) else None


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        return _page(usage() + "\n")
    if arguments[0] in ("-V", "--version"):
        try:
            return _page(version("forescale") + "\n")
        except PackageNotFoundError:  # run from a checkout that isn't installed
            return _page("unknown\n")
    name, rest = arguments[0], arguments[1:]
    if helps := [i for i, argument in enumerate(rest) if argument in ("-h", "--help")]:
        words, sections = rest[: helps[0]], rest[helps[0] + 1 :]
        if len(sections) > 1:
            problem, todo = "--help shows one section", f"write --help {sections[0]}"
            raise UserError(" ".join(sections), problem, todo)
        return _page(help_page(name, words, section="".join(sections)))
    return load(name).main(rest)


def _page(text: str) -> int:
    """Print a text; return exit code 0."""
    print(text, end="")
    tell({"text": text})
    return DONE


def _warning(message, category, filename, lineno, line=None) -> str:
    """Format a warning of ours as a sentence, without the line of source code."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"forescale: {message}\n"
    return _python_warning(message, category, filename, lineno, line)


def usage() -> str:
    """Return the page of `forescale --help`."""
    lines = [f"  {verb:<10} {purpose}" for verb, purpose in VERBS.items()]
    return "\n".join(
        [
            "forescale VERB [TARGET] [KEY=VALUE ...] [--FLAG]",
            "",
            "Pretrain transformers with DeepSpeed, on a laptop or on a SLURM cluster.",
            "",
            *lines,
            "",
            "forescale VERB --help shows a verb's keys, choices and examples,",
            "forescale help the pages of the manual. For programs: every verb takes --json, and",
            "forescale schema shows the keys and what is printed.",
        ]
    )
