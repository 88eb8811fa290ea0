"""Measures the house and holds its budgets: lines, names, arrows between rooms, small files.

    python tests/house.py                     # the table; exit code 1 if a budget is broken
    python tests/house.py --walk              # with the files that a tiny training run passes
    python tests/house.py --names trainer/run # each name that names nothing, with its line

Invariant: reads files as text and syntax trees; only a walk imports the project.
"""

import argparse
import ast
import inspect
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("trainer", "models", "slurm", "conf")
# Words that say nothing of what a value is: a name is a noun of the field.
BANNED = {
    *("found", "made", "own", "what", "told", "said", "asked", "wanted", "wish", "kept", "given"),
    *("passed", "shown", "written", "theirs", "ours", "more", "seen"),
}
# A change that needs more lines lets others go, or raises the number here and says in its commit
# which lines it looked at.
BUDGETS = {
    "lines of source": 98_326,
    "lines of tests": 76_689,
    "lines of the largest room": 16_500,  # scaling/; every other one is below 9,000
    "names that name nothing": 0,
    "file names that occur twice below a room": 0,
    "arrows between rooms": 138,
}
SHORT = 80  # lines; a file as short that only one other imports belongs into that one


def files(*tops: str) -> list[Path]:
    """Return the Python files below some folders or files of the project, sorted."""
    roots = [ROOT / top for top in tops]
    return sorted(p for r in roots for p in ([r] if r.is_file() else r.rglob("*.py")))


def lines(path: Path) -> int:
    """Return the number of lines of a file."""
    return path.read_text().count("\n")


def room(path: Path) -> str:
    """Return the room of a source file: models, slurm, conf, or a folder or file of trainer."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] != "trainer" else parts[1]


def module(path: Path) -> str:
    """Return the name by which a source file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts[1:] if parts[0] == "trainer" else parts
    return ".".join(("forescale", *(inside[:-1] if inside[-1] == "__init__" else inside)))


def nodes(path: Path) -> list[ast.AST]:
    """Return the nodes of a file's syntax tree."""
    return [*ast.walk(ast.parse(path.read_text()))]


def names(tree: list[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of each definition in a file's nodes whose name names nothing."""
    for node in tree:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        else:
            continue
        if name.strip("_").lower() in BANNED:
            yield node.lineno, name


def imports(tree: list[ast.AST], known: dict[str, Path]) -> set[Path]:
    """Return the source files that a file of these nodes imports, lazily or not."""
    modules: set[str] = set()
    for node in tree:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= (below & known.keys()) or {node.module}
    return {known[name] for name in modules & known.keys()}


def repeated(paths: list[Path]) -> list[str]:
    """Return the file names that occur twice below a room, as room/name."""
    counts = Counter((room(p), p.name) for p in paths if p.name != "__init__.py")
    return sorted(f"{place}/{name}" for (place, name), n in counts.items() if n > 1)


def measure() -> tuple[dict[str, int], dict[str, list[str]]]:
    """Return the numbers of the house, and for some of them the places behind it."""
    paths, tests = files(*SOURCE), files("tests")
    known = {module(p): p for p in paths}
    by_room: Counter[str] = Counter()
    for p in paths:
        by_room[room(p)] += lines(p)
    importers: defaultdict[Path, set[Path]] = defaultdict(set)
    arrows: set[tuple[str, str]] = set()
    vague: list[str] = []
    for p in [*paths, *tests]:
        tree = nodes(p)
        vague += [f"{p.relative_to(ROOT)}:{n} {x}" for n, x in names(tree)]
        if p.is_relative_to(ROOT / "tests"):
            continue
        for target in imports(tree, known) - {p}:
            importers[target].add(p)
            arrows |= {(room(p), room(target))} if room(p) != room(target) else set()
    lonely = [p for p in paths if len(importers[p]) == 1 and lines(p) < SHORT]
    twice = repeated(paths)
    numbers = {
        "lines of source": sum(by_room.values()),
        "lines of tests": sum(map(lines, tests)),
        "lines of the largest room": max(by_room.values()),
        "files of source": len(paths),
        "names that name nothing": len(vague),
        "file names that occur twice below a room": len(twice),
        "arrows between rooms": len(arrows),
        f"files under {SHORT} lines that one file imports": len(lonely),
    }
    places = {
        "lines by room": [f"{n:6,} {name}" for name, n in by_room.most_common()],
        "names that name nothing": vague,
        "file names that occur twice below a room": twice,
        "short files that one file imports": [str(p.relative_to(ROOT)) for p in lonely],
    }
    return numbers, places


class Walk:
    """Counts the files of the project that a run passes, and how often it changes the room.

    numbers: the counts, taken where the run enters build_engine and, the last one, train_step.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self._modules: set[str] = set()
        self._changes = 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        """See an event of the interpreter, as sys.setprofile reports it."""
        is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # no body of a module or class
        if event != "call" or not is_function or not (module := self._module(frame)):
            return
        if frame.f_code.co_name == "build_engine":
            self.numbers["files from the command line to the engine"] = len(self._modules)
            self.numbers["changes of room on that way"] = self._changes
        elif frame.f_code.co_name == "train_step":
            self.numbers["files that a steady step touches"] = len(self._modules)
            self._modules.clear()
        self._modules.add(module)
        caller = self._module(frame.f_back) if frame.f_back else ""
        self._changes += bool(caller) and caller.split(".")[1:2] != module.split(".")[1:2]

    @staticmethod
    def _module(frame: FrameType) -> str:
        """Return the name of a frame's module; "" for one of a library, and for the methods that
        dataclasses generate."""
        name = str(frame.f_globals.get("__name__", ""))
        is_file = frame.f_code.co_filename.endswith(".py")
        return name if is_file and name.partition(".")[0] == "forescale" else ""


def walk() -> dict[str, int]:
    """Train a few steps as the only rank, in this process, and return what a reader would pass."""
    from forescale import cli

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617"}
    os._exit = sys.exit  # type: ignore[assignment]  # ranks leave hard
    steps = Walk()
    with tempfile.TemporaryDirectory() as folder, suppress(SystemExit):
        words = ["experiment=quick", "train.steps=6", "train.compile=off", f"run.root={folder}"]
        sys.setprofile(steps)
        cli.main(["train", *words])
    sys.setprofile(None)
    return steps.numbers


def main() -> int:
    """Print the numbers beside their budgets; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", metavar="PATH", help="list the names in these places")
    parser.add_argument("--places", action="store_true", help="list what is behind the numbers")
    parser.add_argument("--walk", action="store_true", help="train a few steps and count files")
    options = parser.parse_args()
    if options.names:
        for path in files(*options.names):
            for line, name in names(nodes(path)):
                print(f"{path.relative_to(ROOT)}:{line} {name}")
        return 0
    numbers, places = measure()
    numbers |= walk() if options.walk else {}
    broken = [name for name, most in BUDGETS.items() if numbers[name] > most]
    for name, number in numbers.items():
        budget = f" of at most {BUDGETS[name]:,}" if name in BUDGETS else ""
        print(f"{number:8,}{budget:20} {name}{'  TOO MANY' if name in broken else ''}")
    for title, rows in places.items() if options.places else ():
        print(f"\n{title}", *rows, sep="\n  ")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
