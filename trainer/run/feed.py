"""From a job and its opened data to the sequence of windows that it trains on.

Invariant: `feed_of` is the only place where configuration becomes an order, so a run, its audit and
its benchmarks read the same windows.
"""

import hashlib
from collections.abc import Sequence

from forescale.config.train import TrainJob
from forescale.data.feed import Feed
from forescale.data.mixture import Interval, Mixture, Stage
from forescale.data.order import Order
from forescale.data.packing_table import Bins, open_bins
from forescale.data.sources import Sources
from forescale.errors import UserError

_MANY_EPOCHS = 4  # repeating up to so often is nearly as good as new (Muennighoff et al. 2023)


def feed_of(job: TrainJob, sources: Sources, skipped: Sequence[Interval] = ()) -> Feed:
    """The training feed of a settled job. Raises UserError where a source holds no window, or the
    run would read one more often than data.max_epochs says."""
    bins = _bins(job, sources) if job.data.packing == "best_fit" else {}
    mixture = _mixture(job, sources, bins)
    _check_epochs(job, mixture)
    return Feed(
        sources.split("train"),
        mixture,
        sources.vocab_size,
        skipped=skipped,
        substitute=job.data.damaged == "substitute",
        documents=job.data.document_mask,
        bins=bins,
        seed=job.train.seed,
    )


def epochs(job: TrainJob, feed: Feed) -> dict[str, float]:
    """How often the whole run reads each source, without skips."""
    return feed.mixture.epochs(job.total_steps * job.train.global_batch)


def notes(job: TrainJob, feed: Feed) -> list[str]:
    """What a user should know of the data although nothing is wrong, a sentence each."""
    return [
        f"{name if len(feed.names) > 1 else 'The data'} is read {times:.1f} times; more than "
        f"{_MANY_EPOCHS} times teaches little that is new."
        for name, times in epochs(job, feed).items()
        if times > _MANY_EPOCHS
    ]


def _bins(job: TrainJob, sources: Sources) -> dict[str, Bins]:
    """The packing tables of each source, made where the cache hasn't got them."""
    length, cache = job.train.sequence_length, job.data.cache_directory
    return {
        name: open_bins(split, length, sources.datasets[name].identity, cache)
        for name, split in sources.split("train").items()
    }


def _mixture(job: TrainJob, sources: Sources, bins: dict[str, Bins]) -> Mixture:
    seed, orders = job.train.seed, {}
    for name, split in sources.split("train").items():
        own = _own_seed(seed, name) if sources.is_mixture else seed
        length, block = job.train.sequence_length, job.data.shuffle_shards
        try:
            orders[name] = Order(split.shard_tokens, length, own, block, bins.get(name))
        except UserError as e:
            raise UserError(sources.datasets[name].where, e.what, e.todo) from None
    weights = job.data.weights or dict.fromkeys(orders, 1)
    firsts = [
        0,
        *((job.steps_of(s) or 0) * job.train.global_batch for s in job.data.stage_starts()),
    ]
    shares = [weights, *(stage["weights"] for stage in job.data.stages)]
    stages = [
        Stage.of(first, [share.get(name, 0) for name in orders])
        for first, share in zip(firsts, shares, strict=True)
    ]
    return Mixture(orders, stages, seed)


def _own_seed(seed: int, name: str) -> int:
    """Sources must not come in lockstep, even two of the same shards."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _check_epochs(job: TrainJob, mixture: Mixture) -> None:
    times = mixture.epochs(job.total_steps * job.train.global_batch)
    for name, limit in job.data.max_epochs.items():
        if times[name] > limit:
            raise UserError(
                f"data.max_epochs.{name}",
                f"the run reads {name} {times[name]:.2f} times where {limit:g} is the most",
                "train shorter, give it less weight, or raise the limit",
            )
