"""A training loop of torch alone, as nanoGPT's (github.com/karpathy/nanoGPT, train.py): no engine,
no ranks, no checks, no rows, batches in memory.

It computes in the job's precision. In bf16 there are two ways:
- autocast: fp32 weights, cast in each forward pass; the loss is torch's cross_entropy of all
  logits. nanoGPT does the same. The residual stream is fp32, where ours is bf16.
- masters: bf16 weights and the model's own loss, and fp32 copies that the optimizer updates. This
  is our arithmetic, but for Muon's momentum, which is fp32 here and bf16 there.
In fp32 weights are fp32 and nothing is cast or copied; then only the losses of the two ways differ.
The optimizer is torch's fused AdamW; or torch.optim.Muon, and that AdamW for all but the matrices.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.config.sections.optimizer import AdamWConfig, MuonConfig
from forescale.config.train import TrainJob
from forescale.engine.compilation import reuse_graphs
from forescale.engine.determinism import set_compiler_mode, use_kernels
from forescale.engine.optim import parameter_groups
from forescale.engine.step import checked_losses
from forescale.run.start import open_sources, settle
from forescale.train.model import build_model
from tests.benchmarks.training import batches


class Plain:
    """The loop over the job's model and batches; called with a number of steps it returns tokens.

    way: "autocast" or "masters". data: batches of a settled job; None: those of its own data.
    """

    def __init__(self, job: TrainJob, way: str, data: Sequence[Any] | None = None):
        if data is None:
            sources = open_sources(job.data)
            job = settle(job, sources)
            data = batches(job, sources, 64)
        self.job, self.data = job, data
        use_kernels(job.train.deterministic, torch.cuda.is_available())
        self.model = build_model(job, job.model.vocab_size)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.masters: list[Tensor] = list(self.model.parameters())
        if way == "masters" and job.precision.kind == "bf16":
            self.masters = [nn.Parameter(p.detach().clone()) for p in self.masters]
            self.model.to(torch.bfloat16)
        self.weights: list[Tensor] = list(self.model.parameters())
        self.optimizers = self._optimizers()
        self.loss = {"autocast": self._cross_entropy, "masters": self._own_loss}[way]
        if job.train.compile != "off":
            set_compiler_mode()
            reuse_graphs()
            if way == "masters":
                self.model.compile()  # with its loss: the very graph that ours has
            else:
                self.loss = torch.compile(self.loss)
        self.step = 0

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the job's optimizer over the fp32 weights, in the groups that ours has."""
        o, muon = self.job.optimizer, self.model.muon_parameters()  # type: ignore[operator]
        names = [name for name, _ in self.model.named_parameters()]
        optimizers: list[torch.optim.Optimizer] = []
        for group in parameter_groups(zip(names, self.masters, strict=True), o, muon):
            options = {"peak": group.peak_learning_rate, "weight_decay": group.weight_decay}
            params = [{"params": group.params, **options}]
            if group.update.is_by_matrix:
                assert isinstance(o, MuonConfig)
                optimizers.append(torch.optim.Muon(params, lr=1.0, momentum=o.momentum))
            else:
                assert isinstance(o, AdamWConfig)
                betas = (o.beta1, o.beta2)
                optimizers.append(
                    torch.optim.AdamW(params, lr=1.0, betas=betas, eps=o.eps, fused=True)
                )
        return optimizers

    def _cross_entropy(self, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        has_bf16 = self.job.precision.kind == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16):
            logits = self.model(tokens_BL)
            flat = logits.flatten(0, 1).float(), targets_BL.flatten()
            return F.cross_entropy(*flat, ignore_index=-100, reduction="sum")

    def _own_loss(self, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        losses, penalty = checked_losses(self.model(tokens_BL, targets_BL), len(tokens_BL))
        return losses.sum() + penalty

    def __call__(self, steps: int) -> int:
        tokens = 0
        for _ in range(steps):
            batch = self.data[self.step % len(self.data)]
            for micro in batch.micro:
                (inputs, targets), _ = micro.arguments(self.device)
                (self.loss(inputs, targets) / batch.targets).backward()
            self._update()
            tokens += batch.targets
            self.step += 1
        self.weights[0].sum().item()  # a GPU has done all of it
        return tokens

    @torch.no_grad()
    def _update(self) -> None:
        job = self.job
        has_masters = self.masters[0] is not self.weights[0]
        if has_masters:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad = weight.grad.float()  # type: ignore[union-attr]
        if job.optimizer.clip:
            nn.utils.clip_grad_norm_(self.masters, job.optimizer.clip)
        lengths = (job.total_steps, job.warmup_steps, job.decay_steps)
        rate = job.schedule.rate(self.step, *lengths)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
        if has_masters:
            torch._foreach_copy_(self.weights, self.masters)
        self.model.zero_grad()
