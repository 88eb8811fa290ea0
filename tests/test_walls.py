"""The walls of the house, held by reading the imports; and what the installation ships."""

import ast
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    p for top in ("trainer", "models", "conf", "slurm") for p in (ROOT / top).rglob("*.py")
)

# From which rooms a room may import, beside itself: the whole plan of the house. A room stands
# below those that are allowed to see it. GROUND is seen by all but models and conf.
GROUND = "ground"
ALLOWED = {
    "models": "",
    "conf": "",
    "ground": "",
    "pages": "",
    "config": "models conf",
    "remote": "",
    "data": "remote",
    "engine": "models config",
    "run": "models config data",
    "resilience": "config run",
    "checkpoint": "remote config engine models run",
    "monitor": "pages config data engine run resilience checkpoint",
    "train": "models config data engine run resilience checkpoint",
    "drill": "config data run resilience monitor",
    "inference": "models config data run checkpoint train",
    "serving": "models inference",
    "inspection": "pages models data inference",
    "plan": "pages models config data engine run monitor train",
    "rehearsal": "pages models config data engine run resilience checkpoint train plan",
    "slurm": "config run resilience checkpoint monitor plan",
    "scaling": "",
    "scaling.config": "config",
    "scaling.fitting": "",
    "scaling.records": "models config data run resilience monitor scaling.fitting",
    "scaling.forecasting": "scaling.fitting",
    "scaling.doubts": "scaling.fitting",
    "scaling.analysis": (
        "run scaling.config scaling.fitting scaling.forecasting scaling.records scaling.doubts"
    ),
    "scaling.design": (
        "models config run scaling.config scaling.fitting scaling.records scaling.forecasting "
        "scaling.analysis"
    ),
    "scaling.study": (
        "config run resilience monitor slurm scaling.config scaling.fitting scaling.records "
        "scaling.analysis scaling.design"
    ),
    "scaling.report": (
        "pages monitor scaling.config scaling.fitting scaling.forecasting scaling.analysis "
        "scaling.design scaling.study"
    ),
    "scaling.actions": (
        "pages config scaling.config scaling.fitting scaling.forecasting scaling.analysis "
        "scaling.design scaling.study scaling.report"
    ),
    "trials": "pages models config data run resilience monitor train inference slurm",
    "verbs": (
        "trials config data engine run resilience checkpoint monitor train drill inference "
        "inspection serving plan rehearsal slurm scaling.config scaling.study scaling.actions"
    ),
    "cli": "config verbs",
    "scaling.view": "config scaling.config scaling.analysis scaling.study",
    "__init__": "data resilience monitor inference plan verbs scaling.view",
    "__main__": "cli",
    "slurm.rank": "slurm cli",  # a rank of SLURM's is the command line's, by another door
}
LIGHT = (
    "ground.storage config.schema config.compose config.frozen config.help config.train run.start "
    "resilience.launcher plan.plan monitor.status scaling.fitting.fit cli verbs.plan verbs.status"
)


def module_of(path: Path) -> str:
    """The name by which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts[1:] if parts[0] == "trainer" else parts
    return ".".join(("forescale", *(inside[:-1] if inside[-1] == "__init__" else inside)))


KNOWN = {module_of(path): path for path in FILES}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path, everywhere: bool = True) -> frozenset[str]:
    """Dotted names that a file imports; without `everywhere`, those at its top level only."""
    tree = parsed(path)
    nodes = [*(ast.walk(tree) if everywhere else tree.body)]
    if everywhere and "TYPE_CHECKING" in path.read_text():  # what only it sees opens no door
        hidden = [n for n in nodes if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
        unseen = {id(inner) for n in hidden for inner in ast.walk(n)}
        nodes = [n for n in nodes if id(n) not in unseen]
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{a.name}" for a in node.names}
            modules |= (below & KNOWN.keys()) or {node.module}
    return frozenset(modules)


def tops(names: frozenset[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def room_of(module: str) -> str:
    parts = module.split(".")[1:]
    if module == "forescale.slurm.rank" or parts[:1] == ["scaling"]:
        return ".".join(parts[:2])
    return parts[0] if parts else "__init__"


def test_a_file_imports_from_the_rooms_that_its_room_may_see():
    for path in FILES:  # one test: a test a file took longer to report than to run
        room = room_of(module_of(path))
        assert room in ALLOWED, f"{room} is a new room: say in ALLOWED what it may import"
        ground = set() if room in ("models", "conf", *GROUND.split()) else set(GROUND.split())
        allowed = {room, *ground, *ALLOWED[room].split()}
        for name in (imports(path) & KNOWN.keys()) - {"forescale"}:
            assert room_of(name) in allowed, f"{module_of(path)} may not import {name}"


def test_the_rooms_stand_above_each_other():
    """No two rooms import each other, not even round a corner."""
    done: set[str] = set()

    def visit(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, " -> ".join([*path, room])
        if room not in done:
            for below in ALLOWED[room].split():
                visit(below, (*path, room))
            done.add(room)

    for room in ALLOWED:
        visit(room, ())


def test_only_the_engine_knows_deepspeed_and_accelerate():
    for path in FILES:
        if room_of(module_of(path)) != "engine":
            assert not tops(imports(path)) & {"deepspeed", "accelerate"}, path


def test_models_know_torch_alone():
    for path in FILES:
        if "models" in path.relative_to(ROOT).parts:
            names = tops(imports(path))
            assert names <= {"torch", "forescale"} | sys.stdlib_module_names, path
            if path.name in ("config.py", "flops.py", "parametrization.py"):
                assert "torch" not in names, f"plan reads {path} on a login node"


def test_runs_and_retries_know_no_torch():
    for path in FILES:
        if room_of(module_of(path)) == "run":
            assert "torch" not in tops(imports(path)), path


def test_one_name_is_imported():
    """Not `trainer`, `models`, `conf` or `slurm`: they are folders of a checkout, and a file of the
    user's may have any of these names."""
    folders = {"trainer", "models", "conf", "slurm"}
    for path in FILES:
        assert not tops(imports(path)) & folders, path


@pytest.mark.parametrize("name", LIGHT.split())
def test_what_answers_in_a_second_loads_no_torch(name):
    """Transitively, over the imports at the top of each file."""
    done, todo = set(), [f"forescale.{name}"]
    while todo:
        module = todo.pop()
        if module in KNOWN and module not in done:
            done.add(module)
            names = imports(KNOWN[module], everywhere=False)
            assert "torch" not in tops(names), f"forescale.{name} loads torch through {module}"
            todo += names


def test_no_import_runs_in_a_circle():
    below = {
        m: imports(p, everywhere=False) & KNOWN.keys() - {m, "forescale"} for m, p in KNOWN.items()
    }

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in below[module]:
                visit(name, (*path, module))
            done.add(module)

    done: set[str] = set()
    for module in KNOWN:
        visit(module, ())


def test_the_installation_has_every_package_and_file():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {n: path.parent for n, path in KNOWN.items() if path.name == "__init__.py"}
    assert {*settings["packages"]} == {*packages}
    data = settings["package-data"]
    installed = {
        path
        for name, folder in packages.items()
        for pattern in [*data["*"], *data.get(name, [])]
        for path in folder.glob(pattern)
    }
    files = {path for folder in packages.values() for path in folder.rglob("*.*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} == installed
