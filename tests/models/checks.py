"""What several tests of models measure alike."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from forescale.models import ModelConfig, Transformer, block


def kept_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes of all storages that autograd keeps after a forward pass, beside the
    weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), looked_up() as also:
        total = forward()
    for value in (v.val for mode in also for v in tree_leaves(mode.storage) if hasattr(v, "val")):
        if isinstance(value, Tensor):
            saved[value.untyped_storage().data_ptr()] = value.untyped_storage()
    got = sum(storage.nbytes() for storage in saved.values())
    assert total.requires_grad  # the graph was alive until now
    return got


def objective(output: Any) -> Tensor:
    """Return the sum of losses, and of a penalty if there is one."""
    losses, penalty = output if isinstance(output, tuple) else (output, 0.0)
    return losses.sum() + penalty


def saved_bytes(config: ModelConfig, dtype: torch.dtype, documents: bool = False) -> int:
    """Return what kept_bytes has of a model of this config and two whole rows."""
    x = torch.zeros(2, config.max_sequence_length, dtype=torch.long)
    model = Transformer(config).to(dtype)
    has_lstm = any(mixer.kind == "lstm" for mixer in config.mixers_used)
    # oneDNN's LSTM keeps a workspace of its own.
    with torch.backends.mkldnn.flags(enabled=not has_lstm):
        return kept_bytes(
            model, lambda: objective(model(x, x, documents_BL=x if documents else None))
        )


@contextmanager
def looked_up() -> Iterator[list]:
    """Collect the modes in which selective checkpointing makes blocks again: each holds the results
    that are looked up instead of computed, which no hook of autograd sees."""
    got, usual = [], block.contexts

    def contexts(drops: bool):
        both = usual(drops)
        got.append(both[1])
        return both

    with patch.object(block, "contexts", contexts):
        yield got


def assert_one_graph(
    model: nn.Module, total: Callable[[Callable], Tensor], tolerance: float = 1e-3
) -> None:
    """Compile the model as one graph; its gradients must equal those without.

    total: of the model, or of it compiled, the sum that is differentiated. aot_eager traces forward
    and backward, and needs no C++ compiler.
    """
    torch._dynamo.reset()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(total(model), parameters)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(total(compiled), parameters)
    for local, peer in zip(got, expected, strict=True):
        torch.testing.assert_close(local, peer, rtol=tolerance, atol=tolerance)
