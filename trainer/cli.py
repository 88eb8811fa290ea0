"""`forescale VERB [TARGET] [key=value ...] [--flag]`: finds the verb, and turns faults into codes.

Invariant: a fault of the user's ends with one sentence and code 2, without a traceback; a fault of
ours keeps its traceback and ends with code 1.
"""

import importlib
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from forescale.errors import DONE, INTERRUPTED, USER, UserError, storage_error

_python_warning = warnings.formatwarning
VERBS = {
    "train": "train a model; on a bare machine, on an embedded corpus",
    "plan": "all problems and prices of a training job, before the queue",
    "submit": "put a training job into the queue of a SLURM cluster",
    "logs": "what a run's ranks say, or said last before they failed",
    "stop": "have a run save and end, wherever it runs",
    "study": "fit scaling laws to runs, and foretell the loss of a bigger one",
    "shards": "make a dataset of your own text",
    "status": "what runs are doing, what they have reached",
    "generate": "let a trained model write",
    "eval": "score a trained model: bits per byte, perplexity",
    "export": "a directory that Hugging Face transformers loads",
    "check": "verify a dataset, a checkpoint or a run, byte for byte",
    "pin": "keep a checkpoint for good",
    "prune": "delete checkpoints that need not stay",
    "doctor": "what this machine has, and what to mend",
    "drill": "injected faults, survived before your eyes",
}


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
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        from forescale.config.suggest import nearest_first

        near = nearest_first(verb, VERBS)[0]
        raise UserError(verb, "no such verb", f"the nearest is `forescale {near}`; see --help")
    if any(word in ("-h", "--help") for word in rest):
        from forescale.config.help import explain

        print(explain(verb), end="")
        return 0
    return importlib.import_module(f"forescale.verbs.{verb}").main(rest)


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


def overrides_of(verb: str, words: Sequence[str]) -> list[str]:
    """The words after a verb as overrides: those without `=` name the verb's target."""
    from forescale.verbs.jobs import JOBS

    target: str = JOBS[verb].TARGET
    bare = [w for w in words if "=" not in w and not w.startswith(("-", "~", "+"))]
    rest = [w for w in words if w not in bare]
    if not bare:
        return rest
    if not target:
        raise UserError(" ".join(bare), f"{verb} takes no name", f"see forescale {verb} --help")
    if target == "input":
        quoted = ",".join(_quoted(word) for word in bare)
        return [f"input=[{quoted}]", *rest]
    if len(bare) > 1:
        todo = f"give one; other words are key=value (see forescale {verb} --help)"
        raise UserError(" ".join(bare), f"{verb} takes one name, not {len(bare)}", todo)
    if target == "run.name" and "/" in bare[0]:
        root, _, name = bare[0].rstrip("/").rpartition("/")
        return [f"run.root={_quoted(root or '/')}", f"run.name={_quoted(name)}", *rest]
    return [f"{target}={_quoted(bare[0])}", *rest]


def _quoted(text: str) -> str:
    """Text as Hydra's grammar reads it back unchanged."""
    # A backslash is itself there, but before a quote.
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'")
    return f"'{escaped}'"
