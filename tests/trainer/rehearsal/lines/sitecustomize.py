"""Notes which of the device's statements a process runs, if this folder is on its path, and the
folder DEVICE_LINES in its environment has statements.json: each process leaves a file there.

A call that notes it is put before each such statement when its file is imported. What torch's
compiler compiles runs no statement: the compiler tells the lines that it goes through.
"""

import ast
import atexit
import builtins
import importlib.abc
import json
import os
import sys
import uuid
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

FOLDER = Path(os.environ["DEVICE_LINES"])
statements: dict[str, list[int]] = json.loads((FOLDER / "statements.json").read_text())
lines: set[tuple[str, int]] = set()
COMPILER = "torch._dynamo.symbolic_convert"


def preceded(path: str, node: ast.stmt) -> list[ast.stmt]:
    """Return a statement, and before it the call if it is the device's."""
    if getattr(node, "lineno", 0) not in statements[path]:
        return [node]
    call = ast.parse(f"if not __is_compiling__(): __note__(({path!r}, {node.lineno}))").body[0]
    for each in ast.walk(call):
        ast.copy_location(each, node)
    return [call, node]


class Loader(SourceFileLoader):
    def get_code(self, fullname):
        path = str(Path(self.path).resolve())
        tree = ast.parse(self.get_data(self.path))
        for node in [*ast.walk(tree)]:
            for name in ("body", "orelse", "finalbody"):
                if isinstance(body := getattr(node, name, None), list):
                    setattr(node, name, [x for each in body for x in preceded(path, each)])
        return compile(tree, self.path, "exec", dont_inherit=True)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if not name.startswith("forescale.") and name != COMPILER:
            return None
        spec = PathFinder.find_spec(name, path)
        if name == COMPILER:
            spec.loader.exec_module = watched(spec.loader.exec_module)
        elif spec is not None and str(Path(spec.origin or "").resolve()) in statements:
            spec.loader = Loader(name, spec.origin)
        return spec


def watched(execute):
    """Return a function that executes the compiler's module, and then notes the lines it sees."""

    def execute_module(module):
        execute(module)
        import torch.compiler

        builtins.__is_compiling__ = torch.compiler.is_dynamo_compiling
        translator = module.InstructionTranslatorBase
        plain = translator.starts_line

        def starts_line(self, line):
            lines.add((self.f_code.co_filename, line))
            plain(self, line)

        translator.starts_line = starts_line

    return execute_module


def write() -> None:
    known = {(str(Path(path).resolve()), line) for path, line in lines}
    rows = (f"{path}:{line}" for path, line in sorted(known) if line in statements.get(path, ()))
    (FOLDER / uuid.uuid4().hex).with_suffix(".txt").write_text("\n".join(rows))


def leave(code: int, leave=os._exit) -> None:
    write()
    leave(code)


builtins.__note__, builtins.__is_compiling__ = lines.add, lambda: False
sys.meta_path.insert(0, Finder())
os._exit = leave
atexit.register(write)
