"""The files of conf/experiment: each composes, or names exactly what the user must add."""

import pytest

from forescale.config.compose import CONF, ConfigError, compose
from forescale.config.train import TrainJob
from forescale.slurm.config import SubmitJob

# By experiment: what the user adds, and the problems without it.
ADDED = {
    "anneal": (["data.sources={web: /data/web, fine: /data/fine}"], ["data.sources"]),
    "branch": (["train.steps=5000"], ["train.steps"]),
    "gpus64": (["data.path=/data/web"], ["data.path"]),
    "masked": ([], []),
    "seq2seq": ([], []),
    "pairs": (["data.path=/data/pairs"], ["data.path"]),
    "own-model": (["model._target_=mypackage.Model"], ["model._target_"]),
    "quick": ([], []),
    "first": ([], []),
    "study": ([], []),
}


def test_every_experiment_is_here():
    assert sorted(ADDED) == sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", ADDED)
def test_it_composes_or_names_what_is_missing(name):
    added, missing = ADDED[name]
    assert not compose(TrainJob, [f"experiment={name}", *added]).problems()
    if missing:
        with pytest.raises(ConfigError) as caught:
            compose(TrainJob, [f"experiment={name}"])
        assert [problem.key for problem in caught.value.problems] == missing


def test_a_choice_on_the_command_line_wins():
    job = compose(TrainJob, ["experiment=study", "data=dataset", "data.path=/data/web"])
    assert (job.data.path, job.optimizer.kind) == ("/data/web", "adamw")


def test_the_study_s_file_says_what_a_study_shares_without_it():
    typed = ["data=bytes", "optimizer=adamw", "validation.every=100 %"]
    assert compose(TrainJob, ["experiment=study"]) == compose(TrainJob, typed)


def test_the_cluster_s_file_is_for_64_gpus():
    nodes = ["slurm.nodes=8", "slurm.gpus_per_node=8"]
    job = compose(SubmitJob, ["experiment=gpus64", "data.path=/data/web", *nodes])
    assert job.world_size == 64
    assert job.tokens_per_step == 2**22
