"""The model of a job, ours or a class of the user's own, its adapters, and its FLOPs per token.

The adapters are those of the library peft, in the place of our modules, or of a class of
transformers (models/adapters.py has their names and costs). Invariant: what they begin with depends
on the seed alone, and not on the stage or the ranks; B is 0, so the model begins as it was.

The protocol for a class of the user's own, named by `model._target_=mypackage.Model`:

    __init__(**kwargs): the other keys under `model`; `vocab_size` and `sequence_length` are added
        if the signature has them. vocab_size counts the ids that the objective adds too.
    forward(tokens_BL, targets_BL=None): int64 each; a target of -100 doesn't count. With targets it
        returns each window's summed cross-entropy in nats, (B,), or that and a scalar penalty that
        is added to the objective only; without targets, logits (B, L, V) (for `generate`).
        documents_BL=None is optional too, and is passed by name, only if attention must stay within
        documents: the number of each token's document in its window, nondecreasing. A token must
        then attend to its own document alone, at positions that count from the document's first
        token in the window.
        padding_mask_BL=None, too, with objectives other than next_token, in micro-batches in
        which a window ends early: bool, False for what no other token may see.
    muon_parameters() -> names, optional: the matrices for Muon; see engine.optim.parameter_groups.
    optimizer_factors() -> {name: models.parametrization.Factors}, optional: what AdamW's learning
        rate, weight decay and eps are multiplied with, and the name of the parameter's class.
    flops_per_token(sequence_length) -> int, optional: forward and backward; without it, 6N.
    compiled_parts() -> modules, optional: those whose forward is compiled, each alone, on a GPU or
        on several ranks; without it the model is one graph. No part may contain another.
    metrics() -> {name: float or 0-dim tensor}, optional: numbers of the step, called once per step
        after its last micro-batch. metrics.jsonl holds them as `extra.NAME`, the mean over ranks.
        The names must be the same on all ranks at every step. Return what forward has stored, not
        a function of parameters: stage 3 partitions them. A tensor costs no synchronisation.
    counters() -> int64 tensor or None, optional: what training forward passes have counted, of the
        same shape on all ranks, not persistent. The engine zeroes it before a step. After the last
        micro-batch counted(totals) receives the sum over micro-batches and ranks, exact below 2^53,
        before metrics() is called; updated() is called after the optimizer's update, but not if the
        update was dropped. Both are needed with counters(). State that depends on it is best a
        persistent integer buffer, which checkpoints hold and no precision rounds.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from forescale.config.target import is_any_class, make
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.models.adapters import is_adapter, is_target, stored_name
from forescale.models.block import Block
from forescale.models.config import ModelConfig
from forescale.models.flops import count
from forescale.models.init import Linear
from forescale.models.parallel.stages import Stage
from forescale.run.feed import objective_of, vocabulary_of

Divide = Callable[[nn.Module], nn.Module]  # a module to this rank's part of it


def build_model(
    job: TrainJob,
    vocab_size: int,
    divide: Divide | None = None,
    draws: bool = True,
    stage: Stage | None = None,
) -> nn.Module:
    """Return the model with its initial weights, drawn from `train.init_seed`, else `train.seed`.

    divide, stage: see models.Transformer; draws: False if all weights are read from a checkpoint
    next. A class of the user's own draws in any case: what it makes of the draws may be more than
    weights. Raises UserError if a class of the user's own can't be imported or made.
    """
    seed = job.train.init_seed
    torch.manual_seed(job.train.seed if seed is None else seed)
    if isinstance(job.model, ModelConfig):
        from forescale.models import Transformer
        from forescale.models.init import Undrawn

        with nullcontext() if draws else Undrawn():
            model = Transformer(job.model, divide, stage)
            return divide(model) if divide else model
    sizes = {"vocab_size": vocabulary_of(job, vocab_size)}
    sizes |= {"sequence_length": job.train.sequence_length}
    if is_any_class(job.model):  # more than the protocol has
        masked, documents = job.objective.sees_both_sides, job.data.document_mask
        sizes |= {"draws": draws, "masked": masked, "documents": documents}
        if job.objective.source_kind:
            sizes["split"] = getattr(objective_of(job, vocab_size), "split", 0)
    own_model = make("model", job.model, **sizes)
    if not isinstance(own_model, nn.Module):
        where = f"model._target_={job.model.target}"
        raise UserError(where, f"is a {type(own_model).__name__}", "name a torch.nn.Module")
    return own_model


def prices_of(job: TrainJob, model: nn.Module, length: int | None = None) -> dict[str, float]:
    """Return the FLOPs per token, forward and backward, by each convention of metrics.Prices.
    length: targets of a row; None: of a window."""
    length = length or job.train.sequence_length
    if isinstance(job.model, ModelConfig):
        config, lora = job.model, job.lora
        full = lora.flops_per_token(config, length)
        causal = lora.flops_per_token(config, length, causal=True)
        return {"full": full, "causal": causal, "six_n": lora.flops_6n(config)}
    trained = num_parameters(model)
    six_n = 6 * trained
    if job.lora.rank:  # a frozen matrix has a gradient of its input alone
        six_n += 4 * (num_parameters(model, frozen=True) - trained)
    flops = getattr(model, "flops_per_token", None)
    full = flops(length) if flops else six_n
    return {"full": full, "causal": full, "six_n": six_n}


def num_parameters(model: nn.Module, frozen: bool = False) -> int:
    """Return the number of trainable parameters, and of the frozen ones if `frozen`, each counted
    once and in full, even if ZeRO-3 has partitioned it."""
    counted = (p for p in model.parameters() if frozen or p.requires_grad)
    return sum(getattr(p, "ds_numel", p.numel()) for p in counted)


def describe(job: TrainJob, model: nn.Module) -> dict[str, Any]:
    """Return parameter counts by every convention: the total, and for our models each part."""
    if isinstance(job.model, ModelConfig):
        counts = count(job.model)
        return {**vars(counts), "blocks_and_head": counts.blocks_and_head}
    return {"total": num_parameters(model)}


def adapting(job: TrainJob, divide: Divide | None) -> Divide | None:
    """Return a function that puts adapters into a block with its weights, freezes the rest, and
    then calls `divide`; `divide` itself if the job has no adapters. So ranks that divide the parts
    divide the adapters too. It is called for each large part of a model.

    Raises UserError without peft.
    """
    if not job.lora.rank:
        return divide
    adapt = _adapter(job)

    def adapted(module: nn.Module) -> nn.Module:
        module.requires_grad_(False)
        if isinstance(module, Block):
            inside = (n for n, part in module.named_modules() if isinstance(part, Linear))
            if names := [name for name in inside if is_target(name, job.lora.targets)]:
                adapt(module, names)
        return divide(module) if divide else module

    return adapted


def _adapter(job: TrainJob) -> Callable[[nn.Module, list[str]], None]:
    """Return a function that puts adapters beside the named matrices of a module. Raises UserError
    without peft."""
    try:
        import peft
    except ImportError:
        problem = "needs the package peft, which is not installed"
        raise UserError("lora.rank", problem, "pip install 'forescale[lora]'") from None
    lora, seed = job.lora, job.train.init_seed
    draws = torch.Generator().manual_seed(job.train.seed if seed is None else seed)
    settings: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha}

    def adapt(module: nn.Module, names: list[str]) -> None:
        config = peft.LoraConfig(**settings, lora_dropout=lora.dropout, target_modules=names)
        with torch.random.fork_rng(devices=[]):  # later parts draw as without adapters
            peft.inject_adapter_in_model(config, module)
        _draw(module, draws)

    return adapt


def _adapt_class(job: TrainJob, model: Any) -> None:
    """Put adapters beside the linear layers of a class of transformers. Raises UserError if it has
    none of lora.targets."""
    every, targets, rank = model.adaptable(), {*job.lora.targets}, job.lora.rank
    if not every:
        problem = "the class has no linear layer (torch.nn.Linear) for an adapter"
        raise UserError("lora.rank", problem, "leave it out, and train all weights")
    names = [n for n in every if not targets or n in targets or targets & {*n.split(".")}]
    if unknown := sorted(t for t in targets if not any(t in n.split(".") or t == n for n in every)):
        last = dict.fromkeys(name.rpartition(".")[2] for name in every)
        problem = f"no linear layer of the class is {unknown[0]!r}"
        raise UserError("lora.targets", problem, f"choose from {', '.join(last)}")
    most = max(min(model.get_submodule(name).weight.shape) for name in names)
    if rank > most:
        problem = f"no matrix with an adapter has a rank above {most:,}, got {rank:,}"
        raise UserError("lora.rank", problem, f"give at most {most:,}; 8 to 64 are usual")
    _adapter(job)(model, names)


def freeze(job: TrainJob, model: nn.Module) -> None:
    """Freeze what is in no large part of a model, such as norms, if the job has adapters; a class
    of transformers gets its adapters here.

    At stage 3 the first block's input gets a gradient, though nothing needs it: by it DeepSpeed
    sees that the block's backward pass is over, and would release its weights too early otherwise.
    """
    if not job.lora.rank:
        return
    any_model: Any = model
    if is_any_class(job.model):
        _adapt_class(job, model)
        entries = any_model.tables()
    else:
        entries = [any_model.dropout]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(stored_name(name)))
    if job.engine.stage == 3:

        def with_gradient(module: nn.Module, args: Any, x_BLD: Tensor) -> Tensor:
            return x_BLD.requires_grad_() if torch.is_grad_enabled() else x_BLD

        for entry in entries:
            entry.register_forward_hook(with_gradient)


@torch.no_grad()
def _draw(block: nn.Module, draws: torch.Generator) -> None:
    """Set the A of each adapter, as peft does: uniform, within 1 / sqrt(inputs)."""
    for name, parameter in block.named_parameters():
        if ".lora_A." in name:
            # Drawn here, for the model may be in a context without draws (models.init.Undrawn).
            unit = torch.rand(parameter.shape, generator=draws)
            parameter.copy_((2 * unit - 1) / parameter.shape[1] ** 0.5)
