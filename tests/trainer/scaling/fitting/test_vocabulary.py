"""The law of the vocabulary, against the published constants, and on simulated runs of it."""

import numpy as np
import pandas as pd
import pytest

from forescale.ground.errors import UserError
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting.laws import VOCABULARY, best_setting
from tests.trainer.scaling.some_laws import WORDS


def test_the_published_constants_give_the_published_vocabularies():
    """For Llama2-70B at least 216K, at the compute that the source's first way gives; N_v grows as
    N^0.83 or a little faster."""
    best = []
    for n in (3e9, 7e10, 3e11):
        flops = (n / np.exp(-2.48465)) ** 2
        values = VOCABULARY.vector(WORDS)[None]
        held, d, words = best_setting(VOCABULARY, values, flops, 6.0, (1e4, 1e13), n)[0]
        assert 6 * (held + words) * d == pytest.approx(flops)
        best.append(words)
    assert best[1] / 8192 == pytest.approx(216e3, rel=0.02)
    assert np.log(best[2] / best[0]) / np.log(100) == pytest.approx(0.85, abs=0.02)


def test_simulated_runs_give_the_best_vocabulary_and_its_interval():
    """A study of 6 sizes and 10 vocabularies (noise 0.2 %), whose names differ in the vocabulary's
    size alone."""
    rng = np.random.default_rng(4)
    sizes = [[3e7, 8e7, 1.5e8, 3e8, 6e8, 1.1e9], [512, 768, 768, 1024, 1536, 2048]]
    (n, width), size = np.repeat(sizes, 10, 1), np.tile(np.geomspace(1e3, 1e5, 10).round(), 6)
    columns = {"parameters": n, "tokens": n * rng.uniform(5, 50, 60), "vocabulary": size * width}
    loss = VOCABULARY.predict(WORDS, **columns) * np.exp(0.002 * rng.standard_normal(60))
    table = pd.DataFrame(columns | {"loss": loss, "vocab_size": size})
    target = TargetPoint(flops=1e21, parameters=3e9)
    job = StudyJob(input=["x"], form="vocabulary", bootstraps=100, target=target)
    study = StudyFit(table, job, "runs")
    best = study.predict()
    values = VOCABULARY.vector(WORDS)[None]
    truth = best_setting(VOCABULARY, values, 1e21, 6.0, (1e4, 1e13), 3e9)[0, 2]
    low, high = best.best["vocabulary"]
    assert low < truth < high < 2 * low
    with pytest.raises(UserError, match=r"write target.parameters="):
        study.predict(TargetPoint(flops=1e21, tokens=1e10, vocabulary=1e8))
