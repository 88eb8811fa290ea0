"""The keys of a cluster: what follows from them, and which contradict each other."""

from dataclasses import replace

import pytest

from forescale.config.compose import compose
from forescale.config.duration import Duration
from forescale.config.schema import ConfigError
from forescale.config.sizes import Sizes
from forescale.slurm.config import SlurmConfig, SubmitJob


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:8", 8),
        ("gpu:h100:8", 8),
        ("gpu", 1),
        ("gpu:h100", 1),
        ("gres/gpu:4", 4),
        ("tmp:200G,gpu:a100:2,gpu:h100:4", 6),
        ("gpu:1g.10gb:7", 7),
        ("tmp:200G", 0),
        (None, 0),
    ],
)
def test_each_gpu_of_gres_gets_a_rank(gres, gpus):
    settings = SlurmConfig(gres=gres)
    assert (settings.gpus, settings.ranks_per_node) == (gpus, gpus or 1)
    assert settings.has_gpus == bool(gpus)
    assert settings.problems() == []


def test_what_gres_gives_is_said():
    (note,) = SlurmConfig(gres="gpu:h100:8", cpus_per_task=2).notes()
    assert note == "slurm.gres=gpu:h100:8 is 8 GPUs per node: 8 ranks on each."
    assert SlurmConfig(gres="gpu:8", gpus_per_node=8, cpus_per_task=2).notes() == []


@pytest.mark.parametrize(
    ("keys", "cpus", "words"),
    [
        ({"cpus_per_task": 12}, 96, None),
        ({"cpus_per_task": 16}, 96, "which ask for 16 each: set slurm.cpus_per_task=12."),
        ({}, 96, "set slurm.cpus_per_task=12, or the GPU may wait"),
        ({"exclusive": True}, 96, None),
        ({"options": ["--cpus-per-gpu=6"]}, 96, None),
        ({"exclusive": True}, 24, "less than 4 for its kernels"),
        ({"cpus_per_task": 2}, 4, "ask for another partition"),
    ],
)
def test_too_few_cpus_for_the_gpus_of_a_node_are_noted(keys, cpus, words):
    note = SlurmConfig(gres="gpu:h100:8", partition="big", **keys).note_on_cpus(cpus)
    if words is None:
        assert note is None
    else:
        assert f"partition big have {cpus} CPUs for 8 ranks" in note
        assert words in note


def test_ranks_on_cpus_choose_their_own_number():
    assert SlurmConfig(tasks_per_node=4).note_on_cpus(4) is None


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"gres": "gpu:h100:8", "gpus_per_node": 4},
            ("gpus_per_node", "4 GPUs, but slurm.gres=gpu:h100:8 has 8"),
        ),
        (
            {"gres": "gpu:h100:many"},
            ("gres", "gpu:h100:many has no number of GPUs that can be read"),
        ),
        (
            {"gres": "gpu:2", "tasks_per_node": 4},
            ("tasks_per_node", "4 ranks need one GPU each, but there are 2"),
        ),
        ({"runtime": "apptainer"}, ("runtime", "needs a container")),
        (
            {"container": "x.sif", "pack": True},
            ("pack", "is for nodes without containers: an image has its own Python"),
        ),
        (
            {"python": "conda run 'x"},
            ("python", "\"conda run 'x\" can't be read (No closing quotation)"),
        ),
        ({"python": " "}, ("python", "has no word")),
        ({"mem_per_gpu": "much", "gres": "gpu:4"}, ("mem_per_gpu", "'much' is not a size")),
        (
            {"mem_per_gpu": "8G", "mem": "64G", "gres": "gpu:4"},
            ("mem_per_gpu", "does not apply beside slurm.mem"),
        ),
        ({"mem_per_gpu": "8G"}, ("mem_per_gpu", "does not apply without GPUs")),
        ({"gpus_per_task": 1}, ("gpus_per_task", "needs the number of ranks per node")),
        (
            {"gpus_per_task": 1, "tasks_per_node": 4, "gres": "gpu:4"},
            ("gpus_per_task", "does not apply beside slurm.gpus_per_node or slurm.gres"),
        ),
        ({"grow": Duration(60, "seconds")}, ("grow", "needs a range of nodes")),
        (
            {"grow": Duration(60, "seconds"), "nodes": Sizes(2, 8), "requeue": False},
            ("grow", "requeues the job, but slurm.requeue=false"),
        ),
        ({"options": ["--exclude=n1", "n2"]}, ("options", "'n2' is no option of sbatch")),
        ({"options": ["[--a=1,--b=2]"]}, ("options", "'[--a=1,--b=2]' is no option of sbatch")),
        ({"srun": ["-m", "cyclic", "x"]}, ("srun", "'x' is no option of srun")),
        ({"srun": ["mpi=none"]}, ("srun", "'mpi=none' is no option of srun")),
    ],
)
def test_keys_that_contradict_each_other_are_a_problem(keys, problem):
    assert [broken[:2] for broken in SlurmConfig(**keys).problems()] == [problem]


@pytest.mark.parametrize(
    ("text", "hours"),
    [("24:00:00", 24), ("1-00:00:00", 24), ("1-12", 36), ("90:00", 1.5), ("24 h", 24)],
)
def test_a_time_may_be_written_as_for_sbatch(text, hours):
    words = ["machine=cpu", "train.micro_batch=2", f"slurm.time={text}"]
    assert compose(SubmitJob, words).slurm.time.seconds == hours * 3600


def test_a_number_that_yaml_makes_of_a_time_is_explained(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/mine.yaml").write_text("time: 24:00:00\n")
    words = ["machine=cpu", "train.micro_batch=2", "slurm=mine"]
    with pytest.raises(ConfigError, match="86400 without a unit"):
        compose(SubmitJob, words, conf_dirs=[tmp_path])
    (tmp_path / "slurm/mine.yaml").write_text("time: '24:00:00'\n")
    assert compose(SubmitJob, words, conf_dirs=[tmp_path]).slurm.time.seconds == 86400


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("[--switches=1,--comment=hi]", ["--switches=1", "--comment=hi"]),
        ("""[--comment="hi, you", '--a b']""", ["--comment=hi, you", "--a b"]),
        ('["--nodelist=n1,n2"]', ["--nodelist=n1,n2"]),
        ("--switches=1", ["--switches=1"]),
    ],
)
def test_options_need_no_quotes_of_hydra_s(text, options):
    words = ["machine=cpu", "train.micro_batch=2", f"slurm.options={text}"]
    assert compose(SubmitJob, words).slurm.options == options


def test_memory_per_gpu_is_that_of_all_gpus_of_a_node():
    assert SlurmConfig(mem_per_gpu="2G", gres="gpu:4").memory_bytes == 8 << 30


def test_a_spare_node_is_no_node_of_the_run():
    keys = ["machine=cpu", "train.micro_batch=2", "slurm.nodes=2", "slurm.spares=1"]
    job = compose(SubmitJob, keys)
    assert (job.world_size, job.nodes) == (2, 2)
    assert "holds 3 nodes and trains on 2" in "".join(job.slurm.notes())


def test_a_rank_without_a_number_of_cpus_is_said():
    few = SlurmConfig()
    assert "a rank gets 1 CPU" in few.notes()[0]
    assert "share all CPUs" in replace(few, exclusive=True).notes()[0]
    assert replace(few, cpus_per_task=8).notes() == []
