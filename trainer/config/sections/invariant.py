"""What `train.invariant` can't be combined with.

Invariant: what passes gives the same bits on any number of ranks that feed windows
(engine/invariant.py).
"""

from typing import TYPE_CHECKING

from forescale.config.job import ProblemIterator
from forescale.config.sections.optimizer import OwnOptimizerConfig

if TYPE_CHECKING:
    from forescale.config.train import TrainJob


def invariant_problems(job: "TrainJob") -> ProblemIterator:
    """Yield the keys that make sums depend on the number of ranks, with train.invariant."""
    if not job.train.invariant:
        return
    without = "or leave train.invariant out"
    engine, sent = job.engine, job.engine.deepspeed.get("communication_data_type")
    if not job.train.deterministic:
        problem = "false lets kernels of a GPU add in any order"
        yield "train.deterministic", problem, f"leave it out, {without}"
    if job.precision.kind == "fp16":
        problem = "gradients of a loss that is scaled have no units that stay"
        yield "precision.kind", problem, f"choose bf16 or fp32, {without}"
    if engine.gradient_dtype == "precision" and job.precision.kind != "fp32":
        problem = "gradients are added in fp32, where that is exact"
        yield "engine.gradient_dtype", problem, f"leave it out, {without}"
    if sent not in (None, "fp32"):
        problem = "gradients are sent in fp32, where their sums are exact"
        yield "engine.deepspeed.communication_data_type", problem, f"leave it out, {without}"
    if engine.quantized_weights:
        problem = "rounds weights in groups that depend on the ranks"
        yield "engine.quantized_weights", problem, f"leave it out, {without}"
    if "gradient_predivide_factor" in engine.deepspeed:
        problem = "divides gradients whose sums are exact"
        yield "engine.deepspeed.gradient_predivide_factor", problem, f"leave it out, {without}"
    if engine.expert_parallel > 1:
        problem = "the tokens of an expert come from other micro-batches on other numbers of ranks"
        yield "engine.expert_parallel", problem, f"write engine.expert_parallel=1, {without}"
    if engine.hierarchical_partition > 1:
        problem = "sums over two levels of ranks have not been shown to be exact"
        yield "engine.hierarchical_partition", problem, f"leave it out, {without}"
    if isinstance(job.optimizer, OwnOptimizerConfig):
        problem = "an optimizer of your own may add up what ranks divide"
        yield "optimizer", problem, f"choose adamw, lion or muon, {without}"
