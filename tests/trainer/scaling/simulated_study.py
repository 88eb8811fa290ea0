"""A simulated study of three budgets: grids, sweeps, repeats, forecasts and costs."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from forescale.scaling.analysis.forecast import read_forecasts, score, write_forecast
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.report.evidence import StageCost, StudyEvidence, evidence

TRUTH = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.35, "beta": 0.37}
BUDGETS = (1e18, 1e19, 1e20)
BEST, BEND = 0.01, 0.02  # learning rate, and log loss an e-fold squared
GONE = SimpleNamespace(role="rate", cell_of="s3-n4", learning_rate=0.08, global_batch=8)


def job(**keys) -> StudyJob:
    return StudyJob(input=["none"], bootstraps=100, cost="6nd", **keys)


def _row(name, stage, n, rate=BEST, batch=8, role="grid", of=None, seed=0, init_seed=0, noise=0.0):
    c = BUDGETS[stage - 1]
    d = c / (6 * n)
    law = float(CHINCHILLA.predict(TRUTH, parameters=n, tokens=d)[0])
    off = BEND * math.log(rate / BEST) ** 2 + 0.01 * math.log(batch / 8) ** 2
    return {
        "name": name, "stage": stage, "role": role, "cell_of": of or name, "budget": c,
        "parameters_blocks_and_head": n, "tokens": d, "flops_6nd": c, "batch": batch,
        "learning_rate": rate, "seed": seed, "init_seed": init_seed, "steps": 100,
        "loss": law * math.exp(off + noise), "data": "d" * 64, "tokenizer": "t" * 64,
        "validation_hash": "v" * 64, "code_version": "0.1.0", "device": "H100", "world_size": 8,
        "device_hours": 2.0,
    }  # fmt: skip


def records(prefix: str = "s") -> pd.DataFrame:
    """Records with learning-rate sweeps at the ends of each budget; the rates of the largest size
    of the last budget are all too high. s2-n2 is repeated twice with other weights, twice with
    other data."""
    rng, rows = np.random.default_rng(0), []
    for stage, c in enumerate(BUDGETS, 1):
        for i, by in enumerate(np.geomspace(0.3, 3, 5)):
            name, n = f"{prefix}{stage}-n{i}", 0.1 * c**0.5 * by
            high = 2.0 if (stage, i) == (3, 4) else 0.8
            noise = 0.001 * rng.standard_normal()
            rows.append(_row(name, stage, n, high * BEST, noise=noise))
            rates = (1.5, 2.0) if high > 1 else (0.5, 2.0)
            for label, by_rate in zip(("low", "high"), rates, strict=True) if i in (0, 4) else ():
                role = {"role": "rate", "of": name, "noise": noise}
                rows.append(_row(f"{name}-lr-{label}", stage, n, high * by_rate * BEST, **role))
    n, name = 0.1 * BUDGETS[1] ** 0.5, f"{prefix}2-n2"
    for batch in (4, 16):
        rows.append(_row(f"{name}-batch-{batch}", 2, n, 0.8 * BEST, batch, "batch", name))
    for i, noise in ((1, 0.004), (2, -0.004)):
        again = {"rate": 0.8 * BEST, "role": "seed", "of": name, "noise": noise}
        rows.append(_row(f"{name}-init{i}", 2, n, init_seed=i, **again))
        rows.append(_row(f"{name}-data{i}", 2, n, seed=i, **again | {"noise": 2 * noise}))
    table = pd.DataFrame(rows)
    tried = table[table["role"].isin(("grid", "rate"))]
    best = tried.groupby("cell_of")["loss"].idxmin()
    return table.assign(fitted=table.index.isin(best))


def known(folder: Path, prefix: str = "s") -> StudyEvidence:
    """The evidence, with forecasts of one run as predicted, one that is worse, and one pending."""
    table = records(prefix)
    fitted = table[table["fitted"] & (table["stage"] < 3)].reset_index(drop=True)
    early = StudyFit(fitted, job(near=None), "early")
    rows = table[table["role"] == "grid"].set_index("name")
    write_forecast(early, folder, "target", TargetPoint(flops=2 * BUDGETS[-1]))
    for name in (f"{prefix}3-n2", f"{prefix}3-n1"):
        at = rows.loc[name]
        size = float(at["parameters_blocks_and_head"])
        target = TargetPoint(parameters=size, tokens=float(at["tokens"]))
        write_forecast(early, folder, name, target)
    forecasts = read_forecasts(folder)
    bad = table["name"] == f"{prefix}3-n1"
    observed = table.assign(loss=table["loss"].where(~bad, table["loss"] * 1.2))
    stages = [
        StageCost(i, c, 9, 9, 9 * c, 8 * c, 10 * c,
                  {"compute": 60.0 * i, "data": 20.0, "lost": 20.0}, 18.0)
        for i, c in enumerate(BUDGETS, 1)
    ]  # fmt: skip
    gone = SimpleNamespace(status="diverged", cell=GONE)
    return evidence(
        job(), table, [gone] if prefix == "s" else [], forecasts=forecasts,
        score=score(forecasts, observed), stages=stages, folder="studies/simulated", cap=2e21,
        statuses={"complete": 27, "diverged": 1},
        versions={"torch": ["2.9", "2.10"]}, times=(0.0, 86400.0),
    )  # fmt: skip
