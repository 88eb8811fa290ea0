"""The model: a transformer in pure PyTorch, with its FLOPs and memory.

It knows nothing about files, ranks or the trainer. `Transformer` is imported on first use, so that
reading a configuration or counting parameters never loads torch.
"""

from typing import TYPE_CHECKING, Any

from forescale.models.config import ModelConfig

if TYPE_CHECKING:
    from forescale.models.transformer import Transformer

__all__ = ["ModelConfig", "Transformer"]


def __getattr__(name: str) -> Any:
    if name == "Transformer":
        from forescale.models.transformer import Transformer

        return Transformer
    raise AttributeError(f"module 'models' has no attribute {name!r}")
