"""Training and scoring on preferences: the losses of their pairs of rows, and the reference.

The reference is the model that the run begins with. It never changes, so its log-probability of
each response is computed once, before the first step, with the engine, the precision and the
micro-batch of the training, and stored with the run (run/references.py).

Invariant: the values of a preference depend on the weights and its two rows alone, so that any
order, number of ranks and resume point gives the same losses.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forescale.checkpoint import choice, writer
from forescale.config.train import TrainJob
from forescale.data.bins import Bins
from forescale.data.dataset import Sources, Split
from forescale.data.objective import IGNORED, window_length
from forescale.data.stream import MicroBatch, validation_windows
from forescale.engine.ranks import ALONE, Ranks, joined
from forescale.engine.step import Engine
from forescale.ground.console import Progress, plus_minus, silent
from forescale.ground.errors import UserError
from forescale.ground.storage import TABLE, hash_file
from forescale.models.heads.preferences import preference_losses, preference_numbers, rewards
from forescale.run.directory import Run
from forescale.run.feed import objective_of, whole_rows_of
from forescale.run.references import References, identities, misfit, stored_references
from forescale.train.evaluate import ratio_stderr

SPLITS = ("train", "validation")
_EVERY = 32  # micro-batches of the reference between two looks at whether to stop


@dataclass(frozen=True)
class Comparison:
    """The DPO losses of the rows of a micro-batch (engine.step.Engine.combine)."""

    beta: float

    def __call__(
        self, nats: Tensor, penalty: Tensor | float, micro: MicroBatch
    ) -> tuple[Tensor, Tensor | float, dict[str, Tensor]]:
        """Return the losses of the preferences, (B,), of their rows' nats, (2B,); the penalty, of
        which a preference counts as much as a target does elsewhere: it is a sum over targets; and
        the numbers to log, (B,) each."""
        assert micro.references is not None
        nats_B2 = nats.view(-1, 2)
        rewards_B2 = rewards(nats_B2, micro.references.to(nats.device), self.beta)
        share = len(nats_B2) / max(1, int((micro.targets != IGNORED).sum()))
        numbers = preference_numbers(nats_B2.detach(), rewards_B2.detach())
        return preference_losses(rewards_B2), penalty * share, numbers


@dataclass(frozen=True)
class PreferenceScore:
    """The score of held-out preferences. loss: the mean, in nats, with its standard error; numbers:
    means by TRL's names; targets, windows: how many were scored."""

    loss: float
    loss_stderr: float
    numbers: Mapping[str, float]
    windows: int

    @property
    def targets(self) -> int:
        return self.windows

    @property
    def accuracy(self) -> float:
        """The share of preferences whose chosen response has the higher reward."""
        return self.numbers["rewards/accuracies"]

    def row(self) -> dict[str, Any]:
        """Return it as the fields of a row of metrics."""
        losses = {"loss": self.loss, "loss_stderr": self.loss_stderr}
        return {**losses, **self.numbers, "targets": self.targets, "windows": self.windows}

    def text(self, of: str = "") -> str:
        """Return it as a part of a sentence."""
        return (
            f"loss {self.loss:.4f}{plus_minus(self.loss_stderr)}, accuracy {self.accuracy:.1%}, "
            f"margin {self.numbers['rewards/margins']:.4f} over {self.windows:,} preferences"
        )


def evaluate_preferences(
    nats: Callable[[MicroBatch], Tensor],
    micros: Iterable[MicroBatch],
    beta: float,
    ranks: Ranks = ALONE,
) -> PreferenceScore:
    """Score preferences with references. All of `ranks` call it together. Without any: NaN.

    nats: returns the summed nats of each row of a micro-batch, (2B,).
    """
    mine = []
    for micro in micros:
        assert micro.references is not None
        is_real = (micro.targets != IGNORED).any(1).view(-1, 2).all(1).tolist()
        both = torch.cat([nats(micro).float().cpu().view(-1, 2), micro.references.float()], 1)
        rows = zip(is_real, both.tolist(), strict=True)
        mine += [(micro.index, i, *row) for i, (real, row) in enumerate(rows) if real]

    def score(parts: list[list[Any]]) -> dict[str, Any]:
        return vars(_score_of(sorted(joined(parts)), beta))

    return PreferenceScore(**ranks.reduce_on_main(mine, score))


def _score_of(every: Sequence[Sequence[float]], beta: float) -> PreferenceScore:
    """Return the score of rows: of each its micro-batch, its place there, and four nats."""
    if not every:
        return PreferenceScore(math.nan, math.nan, {}, 0)
    nats_B2, references_B2 = torch.tensor([row[2:] for row in every]).split(2, 1)
    rewards_B2 = rewards(nats_B2, references_B2, beta)
    losses = preference_losses(rewards_B2).double().numpy()
    loss = math.fsum(losses) / len(every)
    error = ratio_stderr(losses, np.ones(len(every)), loss)
    numbers = preference_numbers(nats_B2, rewards_B2)
    means = {name: math.fsum(each.tolist()) / len(every) for name, each in numbers.items()}
    return PreferenceScore(loss, error, means, len(every))


def pooled_preferences(scores: Sequence[PreferenceScore]) -> PreferenceScore:
    """Return the score of several splits together; each is a stratum (see evaluate.pooled)."""
    full = [score for score in scores if score.windows]
    if not full:
        return PreferenceScore(math.nan, math.nan, {}, 0)
    total = sum(score.windows for score in full)

    def mean(of: Callable[[PreferenceScore], float]) -> float:
        return math.fsum(of(score) * score.windows for score in full) / total

    numbers = {name: mean(partial(lambda of, s: s.numbers[of], name)) for name in full[0].numbers}
    error = math.sqrt(math.fsum((s.loss_stderr * s.windows) ** 2 for s in full)) / total
    return PreferenceScore(mean(lambda s: s.loss), error, numbers, total)


class Reference:
    """Reads or computes the references of a run, with all ranks of an engine together.

    stops: True if this rank was asked to stop; mark: receives its place at every micro-batch.
    """

    def __init__(
        self,
        run: Run,
        job: TrainJob,
        sources: Sources,
        engine: Engine,
        stops: Callable[[], bool],
        mark: Callable[[str], None],
        progress: Progress = silent,
    ):
        self.run, self.job, self.sources, self.engine = run, job, sources, engine
        self.stops, self.mark, self.progress = stops, mark, progress

    def find(self) -> References | None:
        """Return the references; if they are missing, compute and write them first, for which the
        weights of the run's origin are loaded into the engine. None if a rank was asked to stop.

        Raises UserError if they are missing and the origin is gone.
        """
        world, origin = self.engine.world, self.job.run.origin
        has_begun = bool(world.from_main(self.run.checkpoint_steps, self.run.checkpoints))
        stored = world.from_main(lambda: stored_references(self.run), self.run.path)
        references = None if stored is None else References.from_stored(stored)
        if origin.load != "weights" or (has_begun and references is not None):
            where, todo = str(self.run.references), "restore it from a copy"
            if origin.load != "weights":
                todo += f", or copy that of {origin.run}, with which this run goes on"
            if references is None:
                raise UserError(where, "no such file", todo)
            if problem := misfit(references.source, self.job, self.sources):
                raise UserError(where, problem, todo)
            return references
        old = Run.existing(origin.run or "", self.job.run.root)
        start = choice.at_step(old, origin.step, world)

        def source() -> dict[str, Any]:
            """What they are computed from; the checkpoint's table has a hash of each file."""
            table = hash_file(start.path / TABLE).sha256
            weights = {"run": origin.run, "step": start.position.step, "table": table}
            columns = self.job.train.sequence_length
            return {"data": identities(self.sources), "columns": columns, "origin": weights}

        computed_from = world.from_main(source, start.path)
        if references is not None and references.source == computed_from:
            return references
        writer.load(start, self.engine, weights_only=True)
        values = self._computed()
        if values is None:
            return None
        fresh = References(computed_from, values)
        world.from_main(lambda: fresh.write(self.run), self.run.path)
        return fresh

    def _computed(self) -> dict[str, dict[str, np.ndarray]] | None:
        values: dict[str, dict[str, np.ndarray]] = {}
        for split in SPLITS:
            values[split] = {}
            bins = self.engine.world.main_first(
                partial(whole_rows_of, self.job, self.sources, split)
            )
            for name, part in self.sources.split(split).items():
                nats = self._of_split(part, bins[name])
                if nats is None:
                    return None
                values[split][name] = nats
        return values

    def _of_split(self, split: Split, bins: Bins) -> np.ndarray | None:
        """Return the nats of both responses of each preference of a split, (n, 2); None if a rank
        was asked to stop."""
        world, batch = self.engine.world, self.job.train.micro_batch
        fed, total = world.data, int(bins.counts.sum())
        objective = objective_of(self.job, self.sources.vocab_size, held_out=True)
        length = window_length(objective, self.job.train.sequence_length)
        micros = validation_windows(
            split, length, batch, fed.rank, fed.size, objective=objective, bins=bins
        )
        mine: list[tuple[int, list[float]]] = []
        for i, micro in enumerate(micros):
            self.mark("evaluation")
            if i % _EVERY == 0 and world.merged(bool(self.stops()), any):
                return None
            mine.append((micro.index, self.engine.losses(micro).cpu().tolist()))
            done = min(total, (i + 1) * batch * fed.size)
            self.progress("read preferences", done, total, "of them")
        self.mark("summary")
        # Each rank needs all, to read any batch: 25 to 50 bytes a preference, as data take, for any
        # number of ranks.
        every = sorted(joined(fed.gather(mine)))
        nats = [value for _, values in every for value in values]
        return np.array(nats[: 2 * total], np.float32).reshape(-1, 2)
