"""`forescale doctor`: each lack is found, named and given its mend."""

import importlib.metadata
import os
import re
import time
import tomllib
from pathlib import Path

import pytest

from forescale.config.sections.data import CorpusConfig
from forescale.monitor import doctor
from forescale.monitor.doctor import SUPPORTED, Finding
from tests.trainer.monitor.mock_gpus import MockGpus

ROOT = Path(__file__).resolve().parents[3]


def test_the_ranges_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = dict(re.match(r"([\w-]+)(.*)", d).groups() for d in project["dependencies"])
    assert {name: required[name] for name in SUPPORTED} == SUPPORTED
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor.PYTHON))


def test_this_machine_is_ready(forescale, tmp_path, small_data):
    words = [f"run.root={tmp_path / 'runs'}", f"data.cache={tmp_path}", f"data.path={small_data}"]
    code, out, _ = forescale("doctor", *words)
    assert code == 0
    names = [line.split()[1] for line in out.splitlines()[:-2]]
    assert names == [
        *("python", *SUPPORTED, "gpu", "compiler", "ninja", "builds", "cores", "memory"),
        *("run.root", "data.cache", "corpus", "wandb"),
    ]
    assert out.endswith("Ready: forescale train\n")
    assert not (tmp_path / "runs").exists()  # looking makes nothing


def test_faults_end_with_code_2_and_a_fix(forescale, tmp_path):
    (tmp_path / "file").touch()
    words = [f"run.root={tmp_path / 'file' / 'runs'}", f"data.path={tmp_path / 'nothing'}"]
    code, out, _ = forescale("doctor", *words)
    assert code == 2
    assert re.search(r"fault +run\.root .*is a file; choose another run\.root", out)
    assert re.search(r"fault +corpus .*no such dataset", out)
    assert "2 faults to fix" in out


@pytest.mark.parametrize(
    ("version", "level", "package"),
    [
        *[("0.19.7", "fault", "deepspeed"), ("0.19.8", "ok", "deepspeed")],
        *[("0.20.0", "fault", "deepspeed"), ("", "fault", "deepspeed")],
        *[("2.13.0+cpu", "ok", "torch"), ("2.14.0.dev20260101+cu128", "ok", "torch")],
    ],
)
def test_versions_against_the_range(monkeypatch, version, level, package):
    def of(package):
        if not version:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr("importlib.metadata.version", of)
    finding = doctor.package_version(package, SUPPORTED[package])
    assert finding.level == level
    assert level == "ok" or finding.fix == "pip install 'deepspeed>=0.19.8,<0.20'"


def test_no_compiler_is_a_note_that_says_what_it_costs(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    finding = doctor.compiler()
    assert finding.level == "note"
    assert "no-such-compiler" in finding.text
    assert "twice as long" in finding.text
    assert "g++" in finding.fix


def test_a_lock_left_by_a_killed_build(tmp_path):
    assert doctor.build_lock(tmp_path / "nothing").level == "ok"
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert doctor.build_lock(tmp_path).level == "note"  # a build may be running
    os.utime(lock, (time.time() - 3600,) * 2)
    finding = doctor.build_lock(tmp_path)
    assert finding.level == "fault"
    assert finding.fix == f"rm {lock}"


def test_the_build_directory_is_that_of_torch(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert doctor.extensions_directory() == tmp_path


def test_a_full_disk_and_one_that_may_not_be_written_to(monkeypatch, tmp_path):
    assert doctor.disk("run.root", tmp_path / "a" / "b", 1).level == "ok"
    finding = doctor.disk("run.root", tmp_path, 1 << 60)
    assert finding.level == "fault"
    assert "free some space" in finding.fix
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert doctor.disk("run.root", tmp_path, 1).level == "fault"


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("pathlib.Path.glob", lambda self, pattern: iter([Path("0000:00")]))
    finding = doctor.graphics()
    assert finding.level == "fault"
    assert "torch" in finding.text


@pytest.mark.parametrize(("broken", "level"), [({}, "ok"), ({1: "an illegal access"}, "note")])
def test_each_gpu_is_tried_and_not_only_called_by_its_name(broken, level, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(doctor, "TorchGpus", lambda: MockGpus(2, errors=broken))
    finding = doctor.graphics()
    assert finding.level == level
    assert "2 Mock" in finding.text
    assert ("GPU 1: an illegal access" in finding.text) == bool(broken)


def test_fewer_threads_than_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor.cores().level == "note"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert doctor.cores().level == "ok"


def test_wandb_with_and_without_an_account(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert doctor.wandb().level == "note"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert doctor.wandb().level == "ok"


def test_an_embedded_corpus_that_is_not_prepared_is_a_note(tmp_path):
    finding = doctor.corpus(CorpusConfig(cache=str(tmp_path)))
    assert isinstance(finding, Finding)
    assert finding.level == "note"
    assert not list(tmp_path.iterdir())
