"""What a notebook does from the first training to a prediction, without the command line."""

import signal

import pytest

import forescale
from forescale.config.job import overrides_of, words_of
from forescale.config.schema import ConfigError
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.resilience.notebook import TrainingFailed
from forescale.run.command import job_of

KEYS = dict(
    model=dict(num_layers=1, width=32, num_heads=2),
    train=dict(steps=8, sequence_length=32, global_batch=4, micro_batch=4),
    checkpoint=dict(every="4 steps"),
    validation=dict(every="8 steps"),
)


def test_keys_are_words_of_a_command_line():
    keys = dict(run=dict(name="a b"), data=dict(path=None), train=dict(seed=3, deterministic=True))
    words = words_of(keys | dict(logging=dict(wandb=dict(tags=["a", "b"]))))
    assert words == [
        "run.name=a b", "data.path=null", "train.seed=3", "train.deterministic=true",
        "logging.wandb.tags=[a,b]",
    ]  # fmt: skip


def test_keys_reach_the_job():
    words = words_of(KEYS | dict(run=dict(name="x"), logging=dict(wandb=dict(tags=["a", "b"]))))
    job = job_of(TrainJob, overrides_of(TrainJob, words))
    assert (job.model.width, job.train.steps, job.run.name) == (32, 8, "x")
    assert job.logging.wandb.tags == ["a", "b"]


def test_a_wrong_key_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"train\.stepz: no such key"):
        forescale.train_run(train=dict(stepz=3))
    with pytest.raises(UserError, match=r"model\._target_: __main__\.Mine exists in this process"):
        forescale.train_run("model._target_=__main__.Mine")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow  # trains three times
def test_a_notebook(tmp_path, monkeypatch, small_data):
    """Trains, is interrupted, goes on to the same losses; a failure has its last lines."""
    monkeypatch.chdir(tmp_path)
    keys = KEYS | dict(data=dict(path=str(small_data)), launch=dict(processes=1))
    whole = forescale.train_run(run=dict(name="whole"), show=lambda line: None, **keys)
    assert [c.position.step for c in whole.checkpoints()] == [4, 8]

    def stop_once(line: str) -> None:
        if line.startswith("step 2/"):
            signal.raise_signal(signal.SIGINT)

    slow = keys | dict(logging=dict(every="1 steps"))
    with pytest.raises(KeyboardInterrupt):
        forescale.train_run(run=dict(name="cut"), show=stop_once, **slow)
    run = forescale.open_run("cut")
    assert 2 <= run.checkpoints()[-1].position.step < 8
    again = forescale.train_run(run=dict(name="cut"), show=lambda line: None, **slow)
    assert list(again.metrics()["loss"]) == list(whole.metrics()["loss"])
    score = again.evaluate(windows=4)["data"]
    assert score.windows == 4
    assert score.loss > 0
    with pytest.raises(TrainingFailed, match=r"nowhere: no such dataset; make one") as failed:
        forescale.train_run(data=dict(path="nowhere"), show=lambda line: None)
    assert failed.value.code == 2
