"""Whether a model is compiled, and what of it.

Invariant: without a compiler, the model trains uncompiled and the user gets a notice. What an
optimizer computes is the same to the bit in a process that compiles nothing.
"""

import ctypes
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from forescale.config.target import is_any_class
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig

# Of one function in torch's cache, which all blocks share: each kind of block is one, in training
# and in evaluation, with and without a mask, at each length of rows.
_VERSIONS = 64
_METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


class Compilation(NamedTuple):
    """Whether to compile the model, each of its parts alone or as a whole, and a notice for the
    user."""

    enabled: bool
    by_part: bool = False
    notice: str | None = None
    budget: float | None = None  # train.activation_memory_budget


def compilation(job: TrainJob, world_size: int, device: str) -> Compilation:
    """Return whether to compile, from `train.compile` and this machine, and what.

    A CPU that trains alone compiles the whole model, which makes its steps shorter; all others
    compile each part, see compile_parts, and so does train.invariant. device: "cpu" or "cuda".
    Raises UserError if train.compile=on and the machine lacks a compiler, or if nothing is compiled
    that could keep to train.activation_memory_budget.
    """
    missing, budget = compiler_missing(), job.train.activation_memory_budget
    if job.train.compile == "off":
        return Compilation(False)
    if is_any_class(job.model) and job.train.compile == "auto" and budget is None:
        return Compilation(
            False,
            notice="The model is not compiled: for a class of transformers write train.compile=on.",
        )
    if missing and job.train.compile == "on":
        problem = f"this machine lacks {missing}"
        raise UserError("train.compile=on", problem, "install it, or set train.compile=auto")
    if missing and budget is not None:
        problem = f"is for compiled blocks, and this machine lacks {missing}"
        raise UserError(
            "train.activation_memory_budget", problem, "install it, or leave the key out"
        )
    if missing:
        notice = f"The model is not compiled, and trains slower: this machine lacks {missing}."
        return Compilation(False, notice=notice)
    # At stage 3 the hooks inside of what is compiled break its graph; our blocks have none.
    is_whole = job.engine.stage < 3 or isinstance(job.model, ModelConfig)
    enabled = is_whole or job.train.compile == "on"
    if not enabled and budget is not None:
        problem = "is for compiled blocks, and such a class isn't compiled at stage 3"
        raise UserError(
            "train.activation_memory_budget", problem, "leave it out, or train.compile=on"
        )
    by_part = world_size > 1 or device != "cpu" or job.train.invariant
    return Compilation(enabled, by_part=by_part, budget=budget)


def keep_to(budget: float | None) -> None:
    """Let the compiler keep this part of the activations of all that it compiles from now on; None:
    its own choice. What it makes again it chooses by a knapsack of FLOPs and bytes
    (torch._functorch.config.activation_memory_budget).
    """
    import torch._functorch.config as functorch

    functorch.activation_memory_budget = 1.0 if budget is None else budget


def fix_sizes() -> None:
    """Let the compiler make graphs of fixed sizes alone, for each size of rows its own. Left alone,
    it makes one for all sizes when it meets a second; a run that was resumed after it has met but
    one, and would compute other last bits.
    """
    import torch._dynamo.config as dynamo

    dynamo.automatic_dynamic_shapes = False
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VERSIONS)


def reuse_graphs() -> None:
    """Let the compiler take from its cache on disk graphs that have an autograd.Function, as our
    loss is one; left alone, torch divides them into forward and backward again in each process, 2 s
    of a start. The cache's key holds the code of both passes, and all constants in it.
    """
    import torch._functorch.config as functorch

    functorch.autograd_cache_allow_custom_autograd_functions = True


def probe_here() -> None:
    """Let the compiler try in this process whether the libraries load that it has built, one for
    each set of the processor's vector instructions. Left alone it starts a Python for each, at
    every start, 0.9 s in all. Loading runs none of their code: either torch has the symbols that
    they need, or there is an OSError, here as there (torch 2.13, _inductor/cpu_vec_isa.py).
    """
    from torch._inductor.cpu_vec_isa import VecISA

    def loads(isa: Any, path: str) -> bool:
        try:
            ctypes.CDLL(path)
        except OSError:
            return False
        return True

    if hasattr(VecISA, "_probe_load"):  # where torch no longer has it, it probes as it likes
        VecISA._probe_load = loads  # type: ignore[method-assign, assignment]


def put_products_beside_exchanges() -> None:
    """Let the compiler begin what ranks exchange as early as it can, and wait for it at the first
    use: by torch's own passes, over the order of a graph's kernels, whose results stay equal.

    Left alone, autograd's order makes the gradients of a part's matrices before it begins the sum
    of that of the part's input, though nothing in the backward pass of a block needs them.
    """
    import torch._inductor.config as inductor

    inductor.reorder_for_compute_comm_overlap = True
    inductor.reorder_for_compute_comm_overlap_passes = ["raise_comms", "sink_waits"]
    # These two passes use no times, which torch would otherwise estimate by asking the device.
    inductor.estimate_op_runtime = _no_time  # type: ignore[assignment]


def _no_time(_: Any) -> float:
    return 0.0


def compiler_missing() -> str | None:
    """Return what torch.compile lacks on this machine, or None.

    For a CPU it compiles C++; on a GPU Triton compiles a C file that starts its kernels. Both read
    Python's headers.
    """
    if torch.cuda.is_available():
        compiler, language = os.environ.get("CC"), "C"
        known = [compiler] if compiler else ["gcc", "clang"]  # in Triton's order
    else:
        compiler, language = os.environ.get("CXX"), "C++"
        known = [compiler or "g++"]
    if not any(shutil.which(name) for name in known):
        return f"a {language} compiler ({' or '.join(known)})"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.exists() else f"Python's headers ({header})"


def compile_parts(model: nn.Module, backend: str = "inductor") -> bool:
    """Compile the forward of each of the model's own `compiled_parts()`; return False if it has no
    such method.

    One graph of the whole model gives its gradients at the end of the whole backward pass: too late
    to be reduced beside it, or to be freed by stage 2. Of parts, those of the last block come
    first. Blocks that are alike are compiled once, so that the first step takes less time.
    """
    compiled_parts = getattr(type(model), "compiled_parts", None)
    if compiled_parts is None:
        return False
    for part in compiled_parts(model):
        # Not the call: DeepSpeed's hooks, which gather and release weights, stay outside.
        part.forward = torch.compile(part.forward, backend=backend)
    return True


def without_compiler() -> None:
    """Let the optimizers of this process do without torch's compiler, before the first is made.

    torch wraps their methods so that its compiler leaves them alone, and each wrapper imports the
    compiler to say so: 1.3 s of each rank. Where torch no longer wraps one, nothing is changed.
    """
    if "torch._dynamo" in sys.modules:
        return  # nothing to gain
    optimizer, adam = torch.optim.Optimizer, torch.optim.Adam  # its step is AdamW's too
    for owner, name in [*((optimizer, name) for name in _METHODS), (adam, "step")]:
        if plain := getattr(getattr(owner, name), "__wrapped__", None):
            # The wrapper of `step` also turned gradients off.
            setattr(owner, name, torch.no_grad()(plain) if name == "step" else plain)
