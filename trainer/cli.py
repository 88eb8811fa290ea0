"""`forescale VERB [TARGET] [key=value ...] [--flag]`: finds the verb, and turns faults into codes.

Invariant: a fault of the user's ends with one sentence and code 2, without a traceback; a fault of
ours keeps its traceback and ends with code 1.
"""

import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from forescale.errors import DONE, INTERRUPTED, USER, UserError, storage_error
from forescale.verbs import VERBS, load

_python_warning = warnings.formatwarning


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    warnings.formatwarning = _warning
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Into a pipe or a log too, a line is there when it is said, before what is said after it.
        sys.stdout.reconfigure(line_buffering=True)
    try:
        return _dispatch(words)
    except UserError as e:
        print(f"forescale: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        print("forescale: interrupted; the same command goes on.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe had enough: no fault, but training isn't done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED if words[:1] == ["train"] else DONE
    except OSError as e:
        if (fault := storage_error(e)) is None:
            raise
        print(f"forescale: {fault}", file=sys.stderr)
        return USER


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from forescale.run.start import versions

        print(versions()["forescale"])
        return 0
    name, rest = words[0], words[1:]
    verb = load(name)
    if any(word in ("-h", "--help") for word in rest):
        from forescale.config.help import explain

        print(explain(verb.JOB, VERBS[name], verb.EXAMPLES), end="")
        return 0
    return verb.main(rest)


def _warning(message, category, filename, lineno, line=None) -> str:
    """Ours are for the user, who doesn't ask which line of the source says so."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"forescale: {message}\n"
    return _python_warning(message, category, filename, lineno, line)


def usage() -> str:
    """The page of `forescale --help`."""
    lines = [f"  {verb:<10} {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "forescale VERB [TARGET] [key=value ...]",
            "",
            "Pretrain transformers: exact, unlosable, without surprises, predictive.",
            "",
            *lines,
            "",
            "forescale VERB --help shows a verb's keys, choices and examples.",
        ]
    )
