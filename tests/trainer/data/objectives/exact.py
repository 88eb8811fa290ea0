"""What holds for the stream of every objective."""

import torch

from tests.trainer.data.test_stream import collect


def assert_same_anywhere(feed, world: int, micro: int, workers: int) -> None:
    """6 steps of 8 windows at a world size, resumed after 2: the tensors are those of one rank."""
    whole = collect(feed, (0, 6), 0, 1, 8, 8, 1)
    parts = collect(feed, (0, 2), 0, world, 8, micro, workers)
    parts += collect(feed, (2, 6), parts[-1][0].g1, world, 8, micro, workers)
    for (a, one, _), (b, many, _) in zip(whole, parts, strict=True):
        assert (a.step, a.targets) == (b.step, b.targets)
        for name in ("tokens", "targets"):
            joined = torch.cat([getattr(m, name) for m in many])
            assert torch.equal(getattr(one[0], name), joined)
