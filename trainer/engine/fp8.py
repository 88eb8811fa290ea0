"""Matrix products in fp8, by torchao: x and weight of a product, and the gradients behind it, are
rounded to 8 bits with scales that are computed each time.

Formats: e4m3 (3 bits of mantissa) of x and weight; of gradients e5m2 (2 bits) with a scale for each
tensor, e4m3 with one for each row (Micikevicius et al. 2022, arXiv 2209.05433). Results are bf16.
Invariant: a parameter keeps its name, number format, initial weights and optimizer; so a checkpoint
does not say whether its run multiplied in fp8.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.fp8 import fp8_matrices
from forescale.models.init import Linear


def use_fp8(model: nn.Module, recipe: str) -> None:
    """Multiply the matrices of fp8_matrices in fp8 from now on; the model is one of ours."""
    config = model.config
    assert isinstance(config, ModelConfig)
    product = fp8_product(recipe)
    for name in fp8_matrices(config):
        linear = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(linear, Linear), f"{name} is multiplied by {type(linear)}"
        linear.product = product


def fp8_product(recipe: str, emulates: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of x (..., K) and a weight (N, K) that returns (..., N).

    recipe: see PrecisionConfig. emulates: with rounded numbers in their old format, and no kernel
    of fp8: the tests compare kernels with it.
    """
    with _quiet():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # The call also keeps inductor from what makes Triton store wrong bytes of fp8.
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulates)
    with torch.device("meta"):
        like: Any = convert_to_float8_training(nn.Linear(16, 16), config=config)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = Product.apply(x, weight, like.linear_mm_config, like.config)
        return output

    return product


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torchao's import logs on every rank: of kernels for other machines, and of
    functions that newer versions of torch have renamed."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@torch._dynamo.allow_in_graph
class Product(torch.autograd.Function):
    """torchao's product, which keeps the weight itself for the backward pass.

    torchao's own keeps a view of it. A view of what ZeRO stage 3 has gathered would stay in memory
    until the backward pass: of all blocks together, the whole model.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: Any, config: Any) -> Tensor:
        """Return x (..., K) times weight (N, K): (..., N)."""
        ctx.save_for_backward(x, weight)
        ctx.products, ctx.config = products, config
        unused = SimpleNamespace(save_for_backward=lambda *_: None)
        return _torchao().forward(unused, x, weight.t(), products, config)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        context = SimpleNamespace(
            saved_tensors=(x, weight.t()), linear_mm_config=ctx.products, config=ctx.config
        )
        of_x, of_weight_t, *_ = _torchao().backward(context, gradient)
        return of_x, of_weight_t.t(), None, None


def _torchao() -> Any:
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    return matmul_with_hp_or_float8_args
