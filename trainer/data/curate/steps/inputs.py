"""What steps read beside a document: packages of the extra `curate`, and lists of the user.

Invariant: each process reads a list and imports a package once, at the first document; a step
itself holds names alone, so it is small to send to other processes.
"""

from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from forescale.ground.errors import UserError, storage_error

FASTTEXT = ("fasttext-predict", "fasttext", "fasttext-wheel")  # packages with its module
LABEL = "__label__"  # how fastText begins labels
MOST_BYTES = 256_000_000  # of a list; the 4.6 million domains of the University of Toulouse: 95 MB


def package(step: str, name: str) -> ModuleType:
    """Return a package that a step needs. Raises UserError if it isn't installed."""
    try:
        return import_module(name)
    except ImportError as e:
        problem = f"needs the package {e.name or name}, which isn't installed"
        raise UserError(step, problem, 'pip install ".[curate]"') from None


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the version of each of these packages that is installed."""
    known: dict[str, str] = {}
    for name in names:
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    return known


def entries(step: str, path: str) -> tuple[str, ...]:
    """Return the lines of a list, without white space at their ends, empty lines and lines that
    begin with #."""
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(step, f"{path} is no regular file", "give a text file")
    try:
        size = Path(path).stat().st_size
        if size > MOST_BYTES:
            problem = f"{path} has {size:,} bytes; a list has at most {MOST_BYTES:,}"
            raise UserError(step, problem, "cut the list")
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
    except FileNotFoundError:
        raise UserError(step, f"there is no file {path}", "check the path of the list") from None
    except UnicodeDecodeError:
        problem = f"{path} is not UTF-8 text"
        raise UserError(step, problem, "give a text file with one entry a line") from None
    except OSError as e:
        raise storage_error(e) or e from None
    return tuple(line for line in lines if line and not line.startswith("#"))


def labels(model: Any) -> list[str]:
    """Return the labels of a fastText model, without the mark that begins them."""
    # Below zero no label is left out, however unlikely: fasttext-predict has no list of them.
    return sorted(name.removeprefix(LABEL) for name in model.predict("", k=-1, threshold=-1.0)[0])


def fractions(step: str, **settings: float | None) -> None:
    """Raise UserError at a setting that is not in 0..1."""
    for name, value in settings.items():
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{step}.{name}", f"{value} is not between 0 and 1", "give a fraction")


def ranges(step: str, **settings: tuple[float | None, float | None]) -> None:
    """Raise UserError at settings least_X and most_X of which the first is negative or the
    larger."""
    for name, (least, most) in settings.items():
        if (least or 0) < 0 or (most is not None and most < (least or 0)):
            problem = f"no document has at least {least} and at most {most} {name}"
            raise UserError(f"{step}.least_{name}", problem, f"raise most_{name} or lower this")
