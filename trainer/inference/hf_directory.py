"""A directory of Hugging Face transformers, as import reads it: config, weights, small files.

Invariant: nothing in it runs (no pickle, no code of the model's own), a tensor is in memory only as
long as its reader holds it, and what is read whole has bounds (ground/foreign.py).
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forescale.data.tokenizer import given_tokenizer
from forescale.ground.errors import UserError
from forescale.ground.foreign import (
    LARGE,
    open_regular,
    read_bytes,
    read_object,
    read_text,
)
from forescale.models.hf.config_json import MOST_TENSORS

CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
# Files that `export` writes back unchanged, beside tokenizer.json.
_SMALL_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
TEMPLATE = "chat_template.jinja"
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
        self.path, self.config_path = path, path / CONFIG
        if not path.is_dir():
            problem = "no such directory"
            raise UserError(str(path), problem, "name one with config.json and model.safetensors")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_object(self.path / CONFIG, todo=_AGAIN)

    @property
    def tokenizer(self) -> bytes | None:
        """The tokenizer.json; None: there is none."""
        is_there = (self.path / "tokenizer.json").is_file()
        return given_tokenizer(str(self.path)) if is_there else None

    @cached_property
    def small_files(self) -> dict[str, Any]:
        """The content of the files about tokens and generation, by file name."""
        there = [n for n in (*_SMALL_FILES, TEMPLATE) if os.path.lexists(self.path / n)]
        contents: dict[str, Any] = {n: read_object(self.path / n) for n in there if n != TEMPLATE}
        if TEMPLATE in there:
            contents[TEMPLATE] = read_text(self.path / TEMPLATE)
        return contents

    def digest(self) -> str:
        """Return a hash that changes with the model. A file of weights counts as changed with its
        size or time, the others with their content. Raises UserError as reading them does."""
        digest = hashlib.sha256()
        for path in sorted(p for p in self.path.glob("*.safetensors") if p.exists()):
            about = path.stat()
            digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns}\n".encode())
        for name in (*_SMALL_FILES, TEMPLATE, _INDEX, "tokenizer.json"):
            if os.path.lexists(path := self.path / name):
                digest.update(name.encode() + read_bytes(path, LARGE))
        return digest.hexdigest()

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """The tensors of all weight files, by name."""
        tensors: dict[str, Stored] = {}
        count = 0
        for path, names in self._files().items():
            if (count := count + _count(path)) > MOST_TENSORS:
                problem = f"holds more than {MOST_TENSORS:,} tensors, as no published model does"
                raise UserError(str(self.path), problem, _AGAIN)
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
        where = read_object(index, LARGE).get("weight_map")
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


def _count(path: Path) -> int:
    """Return how many tensors a file names, without parsing it: a million of them take seconds.
    Raises UserError if there is no such file, or more names than its format allows."""
    try:
        with open_regular(path) as file:
            size = int.from_bytes(file.read(8), "little")
            return file.read(size).count(b"data_offsets") if size <= LARGE else MOST_TENSORS + 1
    except OSError as e:
        raise UserError(str(path), f"can't be read ({e.strerror})", _AGAIN) from None


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), "pt")
    except (SafetensorError, OSError) as e:
        raise UserError(str(path), f"not a whole safetensors file ({e})", _AGAIN) from None


def as_text(content: Any) -> str:
    """Return the text of a small file from what it holds."""
    return content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
