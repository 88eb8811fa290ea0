"""Config section `lora`: adapters that are trained beside frozen weights.

Invariant: imports no torch.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from forescale.config.job import ProblemIterator
from forescale.config.schema import key
from forescale.config.target import is_any_class
from forescale.models.adapters import (
    candidates,
    flops_6n_with_adapters,
    flops_forward_with_adapters,
    flops_recomputed_with_adapters,
    flops_with_adapters,
    is_target,
    largest_rank,
    num_adapters,
)
from forescale.models.config import ModelConfig
from forescale.models.flops import count, flops_6n, flops_forward, flops_per_token, flops_recomputed

if TYPE_CHECKING:
    from forescale.config.train import TrainJob


@dataclass
class LoraConfig:
    # 32 with a product that is divided by the rank: then the best learning rate hardly depends on
    # the rank (Schulman 2025, thinkingmachines.ai/blog/lora).

    # rank of the adapters beside frozen weights; 0: none, all weights are trained
    rank: int = key(0, ge=0, common=True)
    alpha: float = key(32.0, gt=0)  # an adapter's output is multiplied by alpha / rank
    # matrices that have an adapter: their names, such as query or mlp.up, or mixer or mlp for all
    # in it (of a class of transformers its names, such as q_proj); []: all of the blocks
    targets: list[str] = key([])
    dropout: float = key(0.0, ge=0, lt=1)  # dropout of the inputs of adapters

    @property
    def scale(self) -> float:
        """The factor of the product of an adapter's matrices."""
        return self.alpha / self.rank if self.rank else 0.0

    def counts(self, model: ModelConfig) -> dict[str, int]:
        """Return the numbers of parameters by kind, as models.flops.Counts, with those of adapters
        among total, active, blocks and non_embedding, and alone as `trained adapters`."""
        counts = vars(count(model))
        if not self.rank:
            return counts
        number = num_adapters(model, self.rank, self.targets)
        kinds = ("total", "active", "blocks", "non_embedding")
        return counts | {k: counts[k] + number for k in kinds} | {"trained adapters": number}

    def flops_per_token(self, model: ModelConfig, length: int, causal: bool = False) -> float:
        """Return models.flops.flops_per_token of the model with adapters and frozen weights."""
        if not self.rank:
            return flops_per_token(model, length, causal)
        return flops_with_adapters(model, length, self.rank, self.targets, causal)

    def flops_forward(self, model: ModelConfig, length: int) -> float:
        """Return models.flops.flops_forward of the model with adapters."""
        if not self.rank:
            return flops_forward(model, length)
        return flops_forward_with_adapters(model, length, self.rank, self.targets)

    def flops_recomputed(self, model: ModelConfig, length: int, ranks: int = 1) -> float:
        """Return models.flops.flops_recomputed of the model with adapters."""
        if not self.rank:
            return flops_recomputed(model, length, ranks)
        return flops_recomputed_with_adapters(model, length, self.rank, self.targets, ranks)

    def flops_6n(self, model: ModelConfig) -> int:
        """Return models.flops.flops_6n of the model with adapters and frozen weights."""
        if not self.rank:
            return flops_6n(model)
        return flops_6n_with_adapters(model, self.rank, self.targets)


def problems(job: "TrainJob") -> ProblemIterator:
    """Yield the rules of adapters with the other sections, in keys of the job."""
    lora, model = job.lora, job.model
    if not lora.rank:
        return
    if not job.run.origin.run:
        problem = "adapters stand beside the weights of a trained run, and run.from names none"
        yield "lora.rank", problem, "write forescale finetune FROM, or run.from.run=NAME"
    if not isinstance(model, ModelConfig) and not is_any_class(model):
        problem = "adapters are not for a class of your own"
        yield "lora.rank", problem, "make them in your class"
        return
    for name in ("tensor_parallel", "expert_parallel"):
        if (ranks := getattr(job.engine, name)) > 1:
            problem = f"{name}={ranks} divides the matrices that adapters stand beside"
            yield f"engine.{name}", problem, "leave it out, and take engine=zero3"
    if job.optimizer.matrices:
        problem = "updates whole matrices, of which an adapter has two halves"
        yield "optimizer.kind", problem, "write optimizer=adamw"
    if job.precision.fp8 != "none":
        problem = "multiplies our matrices itself, without their adapters"
        yield "precision.fp8", problem, "leave it out"
    length = job.train.sequence_length
    if not isinstance(model, ModelConfig):  # its matrices are known when it is built
        return
    if model.problems(sequence_length=length):
        return
    if model.has_encoder and model.source_length is None:  # of which no matrix's size depends
        model = replace(model, source_length=max(1, length // 2))
    resolved = model.resolved(model.vocab_size or 1 << 16, length)
    names, most = candidates(resolved), largest_rank(resolved, lora.targets)
    if 0 < most < lora.rank:
        problem = f"no matrix with an adapter has a rank above {most:,}, got {lora.rank:,}"
        yield "lora.rank", problem, f"give at most {most:,}; 8 to 64 are usual"
    for target in lora.targets:
        if not any(is_target(name, [target]) for name in names):
            todo = f"choose from {', '.join(names)}"
            yield "lora.targets", f"no matrix of the model is {target!r}", todo
