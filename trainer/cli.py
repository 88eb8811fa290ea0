"""The command line: `forescale VERB [TARGET] [KEY=VALUE ...] [--FLAG]` runs a verb.

Invariant: a problem of the user's ends with one sentence and code 2, without a traceback. A bug of
this project keeps its traceback and ends with code 1.
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
from forescale.ground.errors import DONE, INTERRUPTED, USER, UserError, storage_error
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
    with visible_output():
        return _run(words)


def _run(words: list[str]) -> int:
    try:
        return _dispatch(words)
    except UserError as e:
        print(f"forescale: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        print("forescale: interrupted; run the same command again to resume.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has closed it: no error, but a training stops
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED if words[:1] == ["train"] else DONE
    except ModuleNotFoundError as e:
        name = (e.name or "").partition(".")[0]
        if name not in _EXTRAS:
            raise
        verb = f"forescale: forescale {words[0]}: needs {name}, which isn't installed"
        print(f"{verb}; pip install 'forescale[{_EXTRAS[name]}]'.", file=sys.stderr)
        return USER
    except RuntimeError as e:
        if str(e) != _NO_HOME:
            raise
        problem = "a path begins with ~ and a name that is no user's"
        print(f"forescale: {words[0]}: {problem}; write the full path.", file=sys.stderr)
        return USER
    except MemoryError as e:
        if words[0] == "train" and "RANK" in os.environ:  # others may have taken it: tried again
            raise
        problem = f"not enough memory ({' '.join(str(e).split()) or 'of this process'})"
        print(f"forescale: {words[0]}: {problem}; make what you gave smaller.", file=sys.stderr)
        return USER
    except OSError as e:
        if (fault := storage_error(e)) is None:
            raise
        print(f"forescale: {fault}", file=sys.stderr)
        return fault.code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return DONE
    if arguments[0] == "--version":
        try:
            print(version("forescale"))
        except PackageNotFoundError:  # run from a checkout that isn't installed
            print("unknown")
        return DONE
    name, rest = arguments[0], arguments[1:]
    if helps := [i for i, argument in enumerate(rest) if argument in ("-h", "--help")]:
        words, sections = rest[: helps[0]], rest[helps[0] + 1 :]
        if len(sections) > 1:
            problem, todo = "--help shows one section", f"write --help {sections[0]}"
            raise UserError(" ".join(sections), problem, todo)
        print(help_page(name, words, section="".join(sections)), end="")
        return DONE
    return load(name).main(rest)


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
            "forescale help the pages of the manual.",
        ]
    )
