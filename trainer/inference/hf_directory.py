"""A directory of Hugging Face transformers, as import reads it: config, weights, small files.

Invariant: nothing in it runs (no pickle, no code of the model's own), and a tensor is in memory
only as long as its reader holds it.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forescale.ground.errors import UserError
from forescale.ground.storage import read_json

CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
# Files that `export` writes back unchanged, beside tokenizer.json.
_SMALL_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_TEMPLATE = "chat_template.jinja"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_AGAIN = "download it again"


@dataclass(frozen=True)
class Stored:
    """One tensor in a weight file."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    def described(self) -> Tensor:
        """Return a tensor on the meta device of the same shape and number format."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self) -> Tensor:
        """Return the tensor. Its file is mapped as long as this tensor lives: opened anew for each,
        it holds no memory for those before."""
        with _opened(self.path) as file:
            return file.get_tensor(self.name)


class HfDirectory:
    """A model's directory. Raises UserError, from here or from its attributes, for what is missing
    or can't be read."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_dir():
            problem = "no such directory"
            raise UserError(str(path), problem, "name one with config.json and model.safetensors")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return _object(self.path / CONFIG)

    @cached_property
    def small_files(self) -> dict[str, Any]:
        """The content of the files about tokens and generation, by file name."""
        contents: dict[str, Any] = {}
        contents |= {name: _object(p) for name in _SMALL_FILES if (p := self.path / name).is_file()}
        if (template := self.path / _TEMPLATE).is_file():
            try:
                contents[_TEMPLATE] = template.read_text("utf-8")
            except UnicodeDecodeError as e:
                raise UserError(str(template), f"isn't UTF-8 (byte {e.start})", _AGAIN) from None
        return contents

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """The tensors of all weight files, by name."""
        tensors: dict[str, Stored] = {}
        for path, names in self._files().items():
            with _opened(path) as file:
                there = set(file.keys())
                for name in there if names is None else names:
                    if name not in there:
                        problem = f"lacks the weight {name}, which {_INDEX} says is in it"
                        raise UserError(str(path), problem, _AGAIN)
                    part = file.get_slice(name)
                    kind = part.get_dtype()
                    if kind not in _DTYPES:
                        problem = f"its weight {name} is {kind}, not {', '.join(_DTYPES)}"
                        todo = "import the model as it was before it was quantised"
                        raise UserError(str(path), problem, todo)
                    tensors[name] = Stored(name, path, tuple(part.get_shape()), _DTYPES[kind])
        return tensors

    def _files(self) -> dict[Path, list[str] | None]:
        """Return the tensors of each weight file; None: all that are in it."""
        if (whole := self.path / _WEIGHTS).is_file():
            return {whole: None}
        index = self.path / _INDEX
        if not index.is_file():
            problem, todo = f"holds no {_WEIGHTS} and no {_INDEX}", _AGAIN
            if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt*")):
                problem = f"holds its weights in pickle files, which run code, and no {_WEIGHTS}"
                todo = (
                    "load it with transformers and write it with save_pretrained, if you trust it"
                )
            raise UserError(str(self.path), problem, todo)
        where = _object(index).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise UserError(str(index), "has no weight_map", _AGAIN)
        files: dict[Path, list[str] | None] = {}
        for name, file in where.items():
            if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*", file):
                raise UserError(str(index), f"names a file outside its directory, {file!r}", _AGAIN)
            names = files.setdefault(self.path / file, [])
            assert names is not None
            names.append(name)
        return files


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(str(path), "is not a JSON object", _AGAIN)
    return content


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise UserError(str(path), "no such file", _AGAIN)
    try:
        return safe_open(str(path), "pt")
    except (SafetensorError, OSError) as e:
        raise UserError(str(path), f"not a whole safetensors file ({e})", _AGAIN) from None


def as_text(content: Any) -> str:
    """Return the text of a small file from what it holds."""
    return content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
