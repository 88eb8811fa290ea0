"""The walls of the house, held by reading the imports."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    p for top in ("trainer", "models", "conf", "slurm") for p in (ROOT / top).rglob("*.py")
)

# From the ground up; a file imports from its own floor and below.
FLOORS = [
    "errors durable duration names schema config config_care config_data config_plan config_slurm "
    "config_study "
    "jobs frozen compose manual recipe faults scenarios models conf",
    "data engine run band memory feeding start guard pulse ranks beats hang stragglers inventory "
    "trace cost traffic",
    "stored retention checkpoint saving evaluate model loop parts metrics profile watch watchdog "
    "heartbeat injector resume",
    "door sampling scoring export replay audit goodput reliability status pace choices plan doctor "
    "device rank summary ending launch verdict drill",
    "slurm",
    "overview scaling",
    "__init__ verbs cli __main__",
]
SLURM_DOOR = {"slurm.rank": "__init__ verbs cli __main__"}
LIGHT = "errors durable duration names schema config jobs frozen compose manual recipe start run"
LIGHT_NOW = [*LIGHT.split(), "launch", "plan", "cli"]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Dotted names that a file imports; without `everywhere`, those at its top level only."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def floor_of(module: str) -> int | None:
    """The floor of a module of ours, by the room it is in."""
    parts = module.split(".")
    if parts[0] in ("models", "conf"):
        return 0
    if parts[0] == "slurm":
        # A rank of SLURM's is the command line's training, by another door.
        return FLOORS.index(SLURM_DOOR.get(module, "slurm"))
    room = parts[1] if len(parts) > 1 else "__init__"
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms.split()), None)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_from_its_own_floor_and_below(path):
    own = floor_of(module_of(path))
    assert own is not None, "a new room: give it a floor in this test"
    modules = {module_of(p) for p in FILES}
    for name in imports(path) & modules - {"trainer"}:
        assert floor_of(name) <= own, f"{module_of(path)} reaches up to {name}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_engine_knows_deepspeed_and_accelerate(path):
    if "engine" not in path.parts:
        assert not tops(imports(path)) & {"deepspeed", "accelerate"}


@pytest.mark.parametrize("path", [p for p in FILES if "models" in p.parts], ids=module_of)
def test_models_know_torch_alone(path):
    assert tops(imports(path)) <= {"torch", "models"} | sys.stdlib_module_names


def test_data_and_engine_do_not_know_each_other():
    for path in FILES:
        for here, there in (("data", "engine"), ("engine", "data")):
            if here in path.parts:
                assert not any(n.startswith(f"trainer.{there}") for n in imports(path)), path


@pytest.mark.parametrize("name", LIGHT_NOW)
def test_what_answers_in_a_second_loads_no_torch(name):
    """Transitively, over the imports at the top of each file."""
    seen, todo = set(), [f"trainer.{name}"]
    known = {module_of(p): p for p in FILES}
    while todo:
        module = todo.pop()
        if module in known and module not in seen:
            seen.add(module)
            names = imports(known[module], everywhere=False)
            assert "torch" not in tops(names), f"trainer.{name} loads torch through {module}"
            todo += names


def test_no_import_runs_in_a_circle():
    known = {module_of(p): p for p in FILES}
    below = {m: imports(p, everywhere=False) & known.keys() - {m} for m, p in known.items()}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in below[module]:
                visit(name, (*path, module))
            done.add(module)

    done: set[str] = set()
    for module in known:
        visit(module, ())


def test_every_test_file_has_a_name_of_its_own():
    """pytest, which imports them by it, stops where two share one."""
    files = [*(ROOT / "tests").rglob("*.py")]
    names = [path.name for path in files if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
