"""Width and depth leave activations and their updates as they are, where the parametrisation says
so, and don't where it doesn't. Over a wider range: run.py coordinates."""

import itertools

import pytest

from forescale.config.sections.optimizer import OptimizerConfig
from tests.benchmarks.coordinates import ADAMW, MUON, over, slopes
from tests.matrix import full_only

pytestmark = pytest.mark.slow  # trains models of several widths and depths


def slopes_of(axis: str, parametrization: str, optimizer: OptimizerConfig = ADAMW, **keys):
    sizes = {"width": (64, 256), "depth": (4, 16)}[axis]
    curves = over(axis, sizes, parametrization, optimizer, seeds=1, **keys)
    return slopes(curves, "size") | {f"{k} moves": v for k, v in slopes(curves, "move").items()}


def test_width_changes_nothing_under_mup():
    flat = slopes_of("width", "mup")
    assert all(abs(slope) < 0.2 for slope in flat.values()), flat


def test_width_changes_much_under_standard():
    steep = slopes_of("width", "standard")
    assert steep["embedding"] < -0.4
    assert min(steep["stream moves"], steep["mlp moves"], steep["attention moves"]) > 0.6, steep


def test_depth_changes_nothing_under_completep_and_much_under_mup():
    """The stream alone still shrinks: the sum of n branches, a 1 / n each, is random at first, and
    what is random of it goes with 1 / sqrt(n)."""
    flat = slopes_of("depth", "completep")
    stream = [flat.pop(name) for name in ("stream", "stream moves")]
    assert all(abs(slope) < 0.25 for slope in flat.values()), flat
    assert all(-0.5 < slope < 0.1 for slope in stream), stream
    assert slopes_of("depth", "mup")["stream moves"] > 0.5


@pytest.mark.slow  # trains several widths
@pytest.mark.parametrize(
    ("optimizer", "tied", "parametrization"),
    [
        (ADAMW, True, "mup"),
        (MUON, False, "completep"),
        *(
            pytest.param(optimizer, tied, parametrization, marks=full_only)
            for optimizer, tied, parametrization in itertools.product(
                (ADAMW, MUON), (False, True), ("mup", "completep")
            )
            if (optimizer, tied, parametrization)
            not in ((ADAMW, True, "mup"), (MUON, False, "completep"))
        ),
    ],
)
def test_width_changes_nothing_with_muon_or_a_tied_table(optimizer, tied, parametrization):
    flat = slopes_of("width", parametrization, optimizer, tie_embeddings=tied)
    assert all(abs(slope) < 0.25 for slope in flat.values()), flat
