"""The library that lets torch believe in a CUDA device: built once for each version of torch.

Invariant: a library in the cache is complete: it is built beside its place, and then renamed.
"""

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from forescale.ground.errors import UserError, shortened
from forescale.ground.storage import cache_directory, make_folder

_SOURCE = Path(__file__).with_name("pretended.cpp")
_COMPILERS = ("c++", "g++", "clang++")


def library() -> Path:
    """Return the path of the library; build it if the cache doesn't have it (3 s).

    Raises UserError without a C++ compiler, or if it fails.
    """
    torch = _folder_of_torch()
    parts = (_SOURCE.read_bytes(), version("torch").encode(), os.fsencode(torch))
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    built = cache_directory() / "rehearsal" / f"pretended-{digest}.so"
    if built.exists():
        return built
    try:  # also with a launcher, such as ccache g++
        chosen, *options = shlex.split(os.environ.get("CXX", "")) or [""]
    except ValueError as e:
        raise UserError("CXX", f"can't be read ({e})", "quote it as for a shell") from None
    names = (chosen,) if chosen else _COMPILERS
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        problem = f"needs a C++ compiler, and this machine has none ({', '.join(names)})"
        raise UserError("rehearse", problem, "install g++, load its module, or set CXX")
    make_folder(built.parent)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        part = Path(folder) / built.name
        include = torch / "include"
        command = [compiler, *options, "-std=c++20", "-O1", "-shared", "-fPIC", str(_SOURCE)]
        command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
        command += [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
        if (torch / "lib/libtorch_cuda.so").exists():  # what is loaded before replaces nothing
            command += ["-Wl,--no-as-needed", "-ltorch_cuda"]
        command += ["-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not part.exists():
            errors = re.findall(r".*(?:error|failed).*", done.stderr) or ["no message"]
            problem = f"its library can't be built with {compiler}: {shortened(errors[0], 300)}"
            todo = "set CXX to a compiler of C++20, such as g++ 11"
            if "No space" in done.stderr:
                todo = "free some, or set FORESCALE_CACHE to another folder"
            raise UserError("rehearse", problem, todo)
        part.replace(built)
    return built


def load(built: Path) -> None:
    """Load the library, before torch is imported: torch looks for CUDA's hooks once, while it is
    imported, and remembers that there are none."""
    assert "torch" not in sys.modules, "torch was imported before the pretended device"
    ctypes.CDLL(str(built), ctypes.RTLD_GLOBAL)


def _folder_of_torch() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
