"""The cheapest way to shard: the fastest that fits, and of equally fast ones the simplest."""

from dataclasses import dataclass
from types import SimpleNamespace

from forescale.plan.options import ShardingOption, cheapest


@dataclass
class Option:
    """What `cheapest` reads of a ShardingOption."""

    name: str
    need: float
    seconds: float | None

    is_as_fast_as = ShardingOption.is_as_fast_as

    @property
    def step(self):
        return SimpleNamespace(seconds=self.seconds)

    def fits(self, available):
        return self.need <= available


def best(available, *seconds):
    options = [Option(f"zero{n}", 100 - 20 * n, s) for n, s in enumerate(seconds)]
    found = cheapest(options, available)
    return found and found.name


def test_the_fastest_that_fits():
    assert best(1000, 1.0, 1.2, 1.3, 0.9) == "zero3"
    assert best(1000, 1.0, 0.9, 1.3, 1.4) == "zero1"
    assert best(70, 0.1, 0.2, 1.3, 1.4) == "zero2"
    assert best(10, 0.1, 0.2, 1.3, 1.4) is None


def test_of_equally_fast_ones_the_first():
    assert best(90, 1.0, 1.005, 1.0, 0.999) == "zero1"


def test_without_a_speed_the_first_that_fits():
    assert best(70, None, None, None, None) == "zero2"
    assert best(10, None, None, None, None) is None
