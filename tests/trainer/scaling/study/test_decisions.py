"""The next sizes are around the vertices so far, and a budget without one is said; so is a sudden
gain when the next stage is forecast."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from forescale.scaling.config import StudyJob
from forescale.scaling.study.decisions import forecast_cells, optimum, say_if_no_vertex
from tests.trainer.scaling.iso_flop_runs import iso_flop_table


def test_a_sudden_gain_is_said_with_the_forecasts_of_the_next_stage(tmp_path):
    runs = iso_flop_table(np.geomspace(1e18, 1e20, 5), sizes=5, width=2.5, noise=0.001)
    runs["parameters_blocks_and_head"], runs["fitted"] = runs["parameters"], True
    job = StudyJob(bootstraps=100)
    common = SimpleNamespace(cost="6nd")
    cell = SimpleNamespace(name="s6-n2", flops={"6nd": 3e20}, tokens=5e10,
                           shape=SimpleNamespace(parameters=10**9))  # fmt: skip
    for share, count in ((0.0, 0), (0.1, 1)):
        study = SimpleNamespace(job=job, folder=tmp_path, forecasts=tmp_path / f"{share}",
                                plan=SimpleNamespace(common=common))  # fmt: skip
        after = np.clip(np.log(runs["flops"] / 1e19) / np.log(3) + 0.5, 0, 1)
        lines = []
        changed = runs.assign(loss=runs["loss"] * (1 - share * after))
        forecast_cells(study, changed, [cell], lines.append)
        warnings = [x for x in lines if x.startswith("Warning: The loss falls faster than any law")]
        assert len(warnings) == count, lines
        assert lines[-1].startswith("Wrote forecasts of 1 runs")


def table(best: dict[float, float]) -> pd.DataFrame:
    """Runs of budgets with their optimum at these N; the sizes are 1e5 to 4e5 times sqrt(C)."""
    rows = [
        {"budget": c, "parameters_blocks_and_head": n * c**0.5, "tokens": c**0.5 / 6 / n,
         "flops_causal": c, "fitted": True, "loss": 2 + 0.1 * np.log(n * c**0.5 / at) ** 2}
        for c, at in best.items() for n in (1e-5, 2e-5, 4e-5)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def lines_of(runs: pd.DataFrame) -> list[str]:
    lines = []
    say_if_no_vertex(runs, StudyJob(), lines.append)
    return lines


def test_vertices_give_the_next_sizes_and_nothing_is_said():
    runs = table({1e18: 2e4, 1e20: 2e5})
    assert lines_of(runs) == []
    assert optimum(runs, StudyJob())(1e22) == pytest.approx(2e6)


def test_a_budget_without_a_vertex_is_said_and_its_best_run_counts():
    runs = table({1e18: 2e5})
    (line,) = lines_of(runs)
    assert line.startswith("Note: 1e+18 FLOPs show no optimum of N: the vertex, at 2e+05")
    assert line.endswith("The next sizes are around its best run, N=40,000.")
    assert optimum(runs, StudyJob())(1e20) == pytest.approx(4e5)
