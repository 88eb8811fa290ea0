"""A dataset read by a PyTorch loop of the user's own."""

import pytest
import torch
from torch.utils.data import DataLoader

import forescale
from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.run.feed import feed_of
from forescale.run.start import open_sources
from tests.trainer.small_run import BATCH, LENGTH, make_job


@pytest.fixture
def data(small_data):
    return forescale.open_dataset(small_data)


def rows(batches, count=None):
    tokens = []
    for batch in batches:
        tokens.append(batch["tokens"])
        if len(tokens) == count:
            break
    return torch.cat(tokens)


def test_batches_are_those_of_a_run(data, small_data, tmp_path):
    job = make_job(small_data, tmp_path)
    feed = feed_of(job, open_sources(job.data))
    expected = feed.read([(0, 3 * BATCH)]).tokens.astype("int64")
    batches = list(zip(range(3), data.stream(LENGTH, BATCH, seed=job.train.seed), strict=False))
    assert torch.cat([b["tokens"] for _, b in batches]).tolist() == expected[:, :-1].tolist()
    full = torch.cat([b["targets"] for _, b in batches])
    assert (full[full >= 0] == torch.from_numpy(expected[:, 1:])[full >= 0]).all()


def test_the_state_goes_on_after_the_last_batch_taken_at_any_number_of_ranks(data):
    whole = rows(data.stream(LENGTH, 4, epochs=1))
    first = data.stream(LENGTH, 4, threads=2)
    read = rows(first, count=2)
    state = first.state_dict()
    parts = []
    for rank in range(2):
        part = data.stream(LENGTH, 4, epochs=1, rank=rank, world_size=2)
        part.load_state_dict(state)
        parts.append(rows(part).view(-1, 2, LENGTH))
    rest = torch.cat(parts, 1).view(-1, LENGTH)
    assert torch.equal(torch.cat([read, rest]), whole)
    assert len(data.stream(LENGTH, 4, epochs=1)) * 4 == len(whole)


def test_a_loader_passes_the_batches_on(data):
    loader = DataLoader(data.stream(LENGTH, 4, epochs=1, documents=True), batch_size=None)
    assert next(iter(loader))["documents"].shape == (4, LENGTH)
    workers = DataLoader(data.stream(LENGTH, 4), batch_size=None, num_workers=1)
    with pytest.raises(RuntimeError, match="num_workers: would be read once by each worker"):
        next(iter(workers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(world_size=3), "4 windows can't be divided among 3 ranks"),
        (dict(rank=2, world_size=2), "2 is none of 2 ranks"),
        (dict(world_size=0), "0 is not a number"),
    ],
)
def test_what_can_not_be_read_is_refused(data, options, message):
    with pytest.raises(UserError, match=message):
        data.stream(LENGTH, 4, **options)


def test_a_state_of_another_order_is_refused(data):
    state = data.stream(LENGTH, 4, seed=1).state_dict()
    with pytest.raises(UserError, match="seed: the state is of 1, these batches of 2"):
        data.stream(LENGTH, 4, seed=2).load_state_dict(state)


def test_the_defaults_are_those_of_training(data):
    job = compose(TrainJob)
    from forescale.data.batches import SHUFFLE_SHARDS

    assert job.data.shuffle_shards == SHUFFLE_SHARDS
    assert data.stream(LENGTH, 4).state_dict()["seed"] == job.train.seed
