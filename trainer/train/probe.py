"""Tries the user's own classes before a run directory is made: builds them, and lets the model make
one forward pass on the meta device, with shapes but without values.

Invariant: what is refused here can't train. What the meta device can't do (a custom kernel, a value
that decides a branch) is no fault: then the first step decides. A launcher tries them in a process
of its own, because importing torch takes it 3 s and 220 MB, and the user's modules may do anything.
Our own models need no try: the rules beside their keys say the same without torch.

An error of the user's own code that a retry would only meet again ends the run with one sentence,
not with three restarts: only one whose kind doesn't depend on the machine, in the first step that a
process makes. All others keep their traceback and are tried again.
"""

import inspect
import json
import math
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Collection
from typing import Any

from forescale.config.frozen import freeze, thaw
from forescale.config.schema import TargetConfig
from forescale.config.sections.optimizer import OwnOptimizerConfig
from forescale.config.target import import_target, is_any_class, targets
from forescale.config.train import TrainJob
from forescale.data.dataset import Sources
from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig

_KINDS = (
    *(TypeError, AttributeError, NameError, ImportError, AssertionError),
    *(IndexError, KeyError, ValueError, NotImplementedError),
)
# Of the many RuntimeErrors those that shapes and types decide, and not memory, devices or peers.
_OF_SHAPES = re.compile(r"shape|size|dimension|broadcast|dtype|must match|must have|expected .* to")
_COMPILED = re.compile(r'File "([^"]+)", line (\d+)')
_LONGEST = 300  # characters of a message


def examine(job: TrainJob, sources: Sources) -> None:
    """Raise UserError if a class of the user's own in `job` can't be made or doesn't work, or if a
    tracker's package is missing."""
    job.logging.check_trackers()
    _examine(job, sources.vocab_size)


def examine_apart(job: TrainJob, sources: Sources) -> None:
    """Do the same, with the user's classes in a process of its own. If that process dies otherwise,
    the ranks decide."""
    job.logging.check_trackers()
    if not (targets(job) or is_any_class(job.model)):
        return
    received, sent = os.pipe()
    try:
        subprocess.run(
            [sys.executable, "-P", "-m", __name__, str(sent), str(sources.vocab_size)],
            input=freeze(job).encode(),
            pass_fds=[sent],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    finally:
        os.close(sent)
        with open(received, "rb") as f:
            answer = f.read()
    if answer:
        raise UserError(*json.loads(answer))


def _examine(job: TrainJob, vocab_size: int) -> None:
    for key, name in targets(job).items():
        import_target(key, name)
    for i, callback in enumerate(job.callbacks):
        _expect_arguments(f"callbacks.{i}", callback)
    if isinstance(job.optimizer, OwnOptimizerConfig):
        _examine_optimizer(job.optimizer, is_cut=job.engine.stage > 0)
    if not isinstance(job.model, ModelConfig):
        examine_model(job, vocab_size)


def _examine_optimizer(config: OwnOptimizerConfig, is_cut: bool) -> None:
    """Raise UserError if the user's optimizer can't be built, keeps states of another size than the
    weights', or updates parts of a matrix otherwise than the whole. is_cut: ZeRO cuts weights into
    parts, each a vector."""
    import torch

    from forescale.engine.optimizers.own import build

    where, updated = f"optimizer._target_={config.target}", []
    cut = "ZeRO cuts weights into vectors, so update each element by itself"
    values, gradients = torch.arange(1.0, 5.0), torch.tensor([3.0, -1.0, 0.5, 2.0])
    ways: list[list[tuple[int, ...]]] = [[(2, 2)], [(1,), (3,)]]
    for shapes in ways if is_cut else ways[:1]:
        sizes, parts = [math.prod(shape) for shape in shapes], []
        for part, slope, shape in zip(
            values.split(sizes), gradients.split(sizes), shapes, strict=True
        ):
            p = torch.nn.Parameter(part.clone().view(shape))
            p.grad = slope.clone().view(shape)
            group = {"params": [p], "weight_decay": 0.0, "name": "all"}
            try:
                parts.append((p, build(config, [group])))
            except UserError as e:
                raise e if len(shape) > 1 else UserError(where, "takes no vector", cut) from e
            try:
                inspect.signature(parts[-1][1].step).bind()
            except TypeError as e:  # such as LBFGS, which computes the loss several times
                todo = "name one whose step() takes no argument"
                raise UserError(where, f"needs more than gradients: step() is {e}", todo) from None
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                for _, optimizer in 3 * parts:
                    optimizer.step()
            states = [(p, dict(optimizer.state[p]).items()) for p, optimizer in parts]
        except Exception:  # such as a kernel of a GPU; then the first step of the run decides
            return
        for p, named in states:
            for name, state in named:
                if torch.is_tensor(state) and state.dim() and state.numel() != p.numel():
                    sizes_text = f"{list(state.shape)} for a weight of {list(p.shape)}"
                    todo = "keep tensors of the weight's shape, or numbers"
                    raise UserError(where, f"keeps {name} of shape {sizes_text}", todo)
        updated.append(torch.cat([p.detach().flatten() for p, _ in parts]))
    if not all(torch.allclose(updated[0], other, equal_nan=True) for other in updated):
        raise UserError(where, "updates parts of a weight otherwise than the whole", cut)


def _expect_arguments(where: str, config: TargetConfig) -> None:
    cls = import_target(f"{where}._target_", config.target)
    try:
        inspect.signature(cls).bind_partial(**config.arguments)
    except TypeError as e:
        problem, todo = f"can't be instantiated ({e})", f"check the keys of section {where}"
        raise UserError(f"{where}._target_={config.target}", problem, todo) from None
    except ValueError:  # a class without a signature
        return


def examine_model(job: TrainJob, vocab_size: int) -> None:
    """Raise UserError if the user's model in `job` can't be built, or its forward pass fails."""
    import torch

    from forescale.engine.step import checked_losses
    from forescale.train.model import build_model
    from forescale.train.model import freeze as freeze_weights

    assert isinstance(job.model, TargetConfig)
    named, where = [job.model.target], f"model._target_={job.model.target}"
    try:
        with torch.device("meta"):
            model = build_model(job, vocab_size)
            freeze_weights(job, model)
    except Exception as e:
        if _is_of_meta(e):
            return
        if isinstance(e, UserError):
            raise
        raise UserError(
            where, f"can't be built ({described(e, named)})", "correct the class"
        ) from e
    if is_any_class(job.model):  # some kernels of such classes lack the device meta
        return
    shape = (job.rows_at_once, job.train.sequence_length)
    ids = torch.zeros(shape, dtype=torch.int64, device="meta")
    masks = {"documents_BL": ids.int()} if job.data.document_mask else {}
    if not job.objective.continues_text:
        masks["padding_mask_BL"] = ids.bool()
    try:
        with torch.no_grad(), torch.device("meta"):
            output = model(ids, ids, **masks)
    except Exception as e:
        # With values it would happen too: wrong arguments, names or shapes.
        is_certain = is_of_shapes(e) or isinstance(e, TypeError | AttributeError | NameError)
        if is_certain and not _is_of_meta(e):
            size = f"{shape[0]} windows of {shape[1]} tokens"
            problem = f"its forward fails on {size} ({described(e, named)})"
            raise UserError(where, problem, "correct the class") from e
        return
    checked_losses(output, shape[0], where)


def _is_of_meta(error: BaseException) -> bool:
    """True if only the meta device, which has no values, may have caused it."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()


def as_users(error: Exception, classes: Collection[str]) -> UserError | None:
    """Return the UserError for an error of the user's own code, with the last line of it that ran;
    None if it isn't one, or if another try may succeed.

    classes: dotted names of the user's own classes; all code of their packages is the user's.
    """
    is_runtime = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
    recurs = is_of_shapes(error) if is_runtime else isinstance(error, _KINDS)
    if isinstance(error, UserError) or not recurs:
        return None
    if (line := _users_line(error, classes)) is None:
        return None
    problem = f"{type(error).__name__}: {_first_line(error)}"
    return UserError(line, problem, "correct it, and give the same command again")


def described(error: BaseException, classes: Collection[str]) -> str:
    """Return an error in one line: its kind, its message, and the user's line that it came from."""
    line = _users_line(error.__cause__ or error, classes)
    return f"{type(error).__name__}: {_first_line(error)}{f', {line}' if line else ''}"


def _users_line(error: BaseException, classes: Collection[str]) -> str | None:
    tops = {name.partition(".")[0] for name in classes}
    lines = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] in tops:
            lines.append((frame.f_code.co_filename, line))
    if not lines and "from user code" in str(error):  # of torch.compile's error only its text
        lines = _COMPILED.findall(str(error))
    return f"{lines[-1][0]}, line {lines[-1][1]}" if lines else None


def is_of_shapes(error: Exception) -> bool:
    """Return True for a RuntimeError of torch that shapes and types decide, and not a device."""
    text = str(error)
    is_of_device = "CUDA" in text or "NCCL" in text or "OutOfMemory" in type(error).__name__
    is_runtime = isinstance(error, RuntimeError) and not is_of_device
    return is_runtime and _OF_SHAPES.search(text) is not None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:_LONGEST]


if __name__ == "__main__":
    sent, vocab_size = map(int, sys.argv[1:])
    job: Any = thaw(TrainJob, sys.stdin.read(), trust=True)  # the command's, by our launcher
    try:
        _examine(job, vocab_size)
    except UserError as e:
        os.write(sent, json.dumps([e.where, e.problem, e.todo]).encode())
