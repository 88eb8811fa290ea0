"""Reads the YAML of a file that anybody may have written.

Invariant: whatever the bytes are, reading takes memory and time in proportion to them, or ends with
a UserError: too deep a nesting is refused, and so are anchors whose values, written out, would make
it far larger or never end.
"""

from pathlib import Path
from typing import Any

import yaml

from forescale.ground.errors import UserError

_DEEPEST = 100  # levels; our own files have fewer than ten
_MOST_NODES = 200_000  # of a file with every anchor written out; our own have some hundred


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_yaml(raw: bytes, where: str | Path, todo: str = "restore the file") -> Any:
    """Return the content of a YAML file. where, todo: for the UserError that is raised if it isn't
    YAML, is nested too deeply, or too large with its anchors written out."""
    try:
        loader = _Loader(raw.decode())
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _MOST_NODES:
            raise UserError(str(where), "is too large with its anchors written out", todo)
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(str(where), "is nested too deeply", todo) from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}", "is not valid YAML", todo) from e
    except (UnicodeDecodeError, ValueError, OverflowError) as e:  # such as the date 2026-99-99
        raise UserError(str(where), "is not valid YAML", todo) from e


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of nodes below one, each as often as an alias names it; sizes: those that
    are known, by id."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = _MOST_NODES + 1  # one that contains itself has no end
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_size(inner, sizes) for inner in node.value)
    elif isinstance(node, yaml.MappingNode):
        total += sum(_size(k, sizes) + _size(v, sizes) for k, v in node.value)
    sizes[id(node)] = total
    return total
