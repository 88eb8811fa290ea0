"""The launcher warns of a sudden gain when it forecasts the next stage."""

from types import SimpleNamespace

import numpy as np

from forescale.scaling.config import StudyJob
from forescale.scaling.study.decisions import forecast_cells
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
