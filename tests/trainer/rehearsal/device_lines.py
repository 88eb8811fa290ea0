"""The statements of the source that only a device runs, by what their conditions and calls name.

A statement is one if it names something of a device; if it stands in the branch of a condition that
does, or behind an `if` without a device that returns; or in a function that only such statements
call. Invariant: reads files as text and syntax trees, and imports no part of the project.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = Path(find_spec("forescale").origin).parent  # type: ignore[union-attr, arg-type]
NAMES = re.compile(
    r"is_cuda|has_cuda|on_gpu|\bcuda\b|pin_memory|\.pinned\(|non_blocking|\bStream\b|nccl|"
    r"(current|wait|record|default)_stream\(|current_device|fits_flex|\bflex\(|, BlockMask\)"
)
# What no rank of a training imports, and the rehearsal itself.
OTHERS = {"rehearsal", "plan", "monitor", "inference", "inspection", "serving", "scaling", "drill"}
WITHOUT = re.compile(r"\bnot [\w.]*(cuda|on_gpu)|!= .cuda")  # a condition without a device
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Statement(NamedTuple):
    """A statement: its file, the function that it stands in, its line; what it calls by name."""

    path: Path
    function: str
    line: int
    on_device: bool
    calls: frozenset[str]

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.function or 'module'}"

    @property
    def imported(self) -> str:
        """The file that processes import, which an installation has elsewhere."""
        top, *rest = self.path.relative_to(ROOT).parts
        return str(Path(PACKAGE, *([] if top == "trainer" else [top]), *rest).resolve())


def _header(node: ast.stmt) -> list[ast.AST]:
    """Return the parts of a statement that are no statements of their own."""
    parts: list[ast.AST] = []
    for _, value in ast.iter_fields(node):
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST) and not isinstance(
                each, ast.stmt | ast.excepthandler | ast.match_case
            ):
                parts.append(each)
    return parts


def _walk(path: Path, body: list[ast.stmt], function: str, on: bool) -> Iterator[Statement]:
    for node in body:
        if isinstance(node, _Function | ast.ClassDef):
            inner = node.name if isinstance(node, _Function) else function
            yield from _walk(path, node.body, inner, on)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            continue
        header = _header(node)
        text = " ".join(ast.unparse(part) for part in header)
        names_it = bool(NAMES.search(text))
        funcs = [n.func for part in header for n in ast.walk(part) if isinstance(n, ast.Call)]
        calls = {getattr(f, "attr", getattr(f, "id", "")) for f in funcs}
        yield Statement(path, function, node.lineno, on or names_it, frozenset(calls))
        if isinstance(node, ast.If) and names_it:
            without = bool(WITHOUT.search(text))
            yield from _walk(path, node.body, function, on or not without)
            yield from _walk(path, node.orelse, function, on or without)
            on |= without and isinstance(node.body[-1], ast.Return)
            continue
        for name in ("body", "orelse", "finalbody"):
            yield from _walk(path, getattr(node, name, []), function, on)
        for handler in getattr(node, "handlers", []):
            yield from _walk(path, handler.body, function, on)


@cache
def device_statements() -> frozenset[Statement]:
    """Return all of them, of trainer/ and models/."""
    paths = [p for top in ("trainer", "models") for p in sorted((ROOT / top).rglob("*.py"))]
    paths = [p for p in paths if p == p.resolve() and not OTHERS & {*p.parts}]
    known = [s for p in paths for s in _walk(p, ast.parse(p.read_text()).body, "", False)]
    names = [s.function for s in known]
    while True:
        device = {c for s in known if s.on_device for c in s.calls}
        device -= {c for s in known if not s.on_device for c in s.calls}
        device &= {*names} - {""}
        behind = [s for s in known if not s.on_device and s.function in device]
        if not behind:
            return frozenset(s for s in known if s.on_device)
        known = [s._replace(on_device=s.on_device or s.function in device) for s in known]
