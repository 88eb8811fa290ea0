"""Tasks of lm_eval by name or by file, with their data.

Invariant: a problem of a task is a UserError that names it, before a model is loaded.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import yaml
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm

from forescale.config.suggest import nearest_first
from forescale.ground.errors import UserError

Loaded: TypeAlias = "Task | Group | list[Task]"  # a list: the tasks of a tag
_FILES = ("json", "csv", "parquet", "text", "arrow", "pandas", "xml", "webdataset")
_NEAR = 5  # names that a message offers


def loaded_tasks(names: Sequence[str]) -> dict[str, Loaded]:
    """Return the tasks of these names or files (.yaml), each with its data, in order.

    A group in a file may hold tasks of other files beside it, and of lm_eval. Raises UserError for
    an unknown or invalid task, and for one whose data is not on this machine.
    """
    named = [name for name in names if name.endswith((".yaml", ".yml")) or "/" in name]
    files = {name: Path(name).expanduser() for name in named}
    contents = {name: _content(name, path) for name, path in files.items()}
    manager = TaskManager(
        include_path=[*dict.fromkeys(str(path.resolve().parent) for path in files.values())],
        # Reading the list of all of them takes seconds.
        include_defaults=len(files) < len(names) or any("group" in c for c in contents.values()),
    )
    tasks: dict[str, Loaded] = {}
    for name in names:
        if name not in files and name not in manager.task_index:
            near = ", ".join(nearest_first(name, manager.all_tasks)[:_NEAR])
            problem = f"{name!r} is neither a task of lm_eval nor a file"
            raise UserError("tasks", problem, f"did you mean one of {near}?")
        tasks[name] = _loaded(manager, name, files.get(name), contents.get(name))
    return tasks


def _content(name: str, path: Path) -> dict[str, Any]:
    """Return the content of a task's file, with functions as names. Raises UserError."""
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "there is no such file"
        raise UserError(name, problem, "name the .yaml file of a task, or a task of lm_eval")
    try:
        content = load_yaml(path, resolve_func=False)
    except (yaml.YAMLError, ValueError, OSError) as e:
        raise UserError(name, f"can't be read as YAML ({_line(e)})", "correct it") from None
    if not any(isinstance(content.get(key), str) for key in ("task", "group")):
        problem = "is no task of lm_eval: it has neither the key `task` nor `group`"
        raise UserError(name, problem, "give the task a name, such as task: mine")
    return content


def _loaded(
    manager: TaskManager, name: str, file: Path | None, content: dict[str, Any] | None
) -> Loaded:
    """Return a task with its data. file, content: of a task that is named by its file."""
    if content is None:
        entry = manager.task_index[name]
        content = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {}
    try:
        if file is not None and isinstance(content.get("group"), str):
            # By its path, lm_eval takes the list of tasks in it for its name.
            entry = Entry(name=content["group"], kind=Kind.GROUP, yaml_path=file.resolve())
            loaded = manager._factory.build(entry, registry=manager._index)
        else:  # `load` would name tasks of two files that are alike
            loaded = manager._load_spec(name)
    except ModuleNotFoundError as e:
        problem = f"needs the package {e.name}, which isn't installed"
        raise UserError(name, problem, f"pip install {e.name}") from None
    except (OSError, DatasetsError) as e:
        raise _without_data(name, content, e) from None
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, TemplateError) as e:
        problem = f"lm_eval can't make a task of it ({type(e).__name__}: {_line(e)})"
        raise UserError(name, problem, "correct its file") from e
    for task in leaves(loaded):
        if getattr(task, "UNSAFE_CODE", False):
            problem = "runs code that the model writes"
            todo = "run it in a container, by lm_eval with forescale.open_run(...).language_model()"
            raise UserError(name, problem, todo)
        if getattr(task, "MULTIMODAL", False):
            raise UserError(name, "asks about pictures or sounds", "name a task of text")
    return loaded


def _without_data(name: str, content: dict[str, Any], error: Exception) -> UserError:
    """Return the error of a task whose data is not on this machine."""
    where = content.get("dataset_path")
    if where in _FILES or (isinstance(where, str) and Path(where).exists()):
        problem = f"its data can't be read ({_line(error)})"
        return UserError(name, problem, "name files that exist, as seen from the current directory")
    problem = (
        f"needs the dataset {where or 'of its tasks'} of the Hugging Face hub, which isn't here"
    )
    loads = f"`datasets.load_dataset({where!r})`" if where else "datasets.load_dataset"
    todo = (
        f"run {loads} where there is a network and copy its cache (HF_HOME), "
        "or write a task file with dataset_path: json and data_files of your own"
    )
    return UserError(name, problem, todo)


def leaves(loaded: Loaded) -> list[Task]:
    """Return the single tasks of a task, group or tag."""
    if isinstance(loaded, Group):
        return list(loaded.get_all_tasks())
    return loaded if isinstance(loaded, list) else [loaded]


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a task's file, followed by the files that it includes."""
    digest = hashlib.sha256()
    for file in _with_included(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _with_included(path: Path) -> Iterator[Path]:
    yield path
    others = load_yaml(path, resolve_func=False, recursive=False).get("include") or []
    for other in others if isinstance(others, list) else [others]:
        yield from _with_included(path.parent / other)  # an absolute path stays as it is


@contextmanager
def quiet() -> Iterator[None]:
    """Silence lm_eval: its progress bars, and its notes on each default."""
    logger, init = logging.getLogger("lm_eval"), tqdm.__init__
    level, had_bars = logger.level, datasets.are_progress_bars_disabled()

    def without_bar(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs | {"disable": True})

    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    tqdm.__init__ = without_bar
    try:
        yield
    finally:
        tqdm.__init__ = init
        logger.setLevel(level)
        if not had_bars:
            datasets.enable_progress_bars()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
