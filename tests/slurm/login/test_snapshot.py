"""The code that a job takes with it: ours, the environment, and what the user's classes import."""

import json
import os
import subprocess
import sys
import tarfile

import pytest

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.slurm.login import snapshot
from forescale.slurm.login.snapshot import described, own_packages, pack_environment, write_code

# A model beside a module, a package with data, and files that nothing imports.
FILES = {
    "net.py": "import json\nimport helpers\n\n\nclass Net:\n    sizes = helpers.sizes()\n",
    "helpers.py": "def sizes():\n    from pieces.block import SIZES\n\n    return SIZES\n",
    "pieces/__init__.py": "",
    "pieces/block.py": (
        "import importlib.resources as r, json\nimport net\n"
        "SIZES = json.loads((r.files('pieces') / 'sizes.json').read_text())\n"
    ),
    "pieces/sizes.json": "[3, 5]",
    "pieces/.cache/large.bin": "x",
    "json.py": "raise SystemExit('this is not the standard library')\n",
    "yaml.py": "raise SystemExit('this is not the installed one')\n",
    "notes.py": "import yaml\n",
    "loud.py": "class Loud: ...\n",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name, text in FILES.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setattr(sys, "path", [*sys.path])  # the search appends this directory
    return tmp_path / "mine"


def job(target="net.Net"):
    return compose(TrainJob, [f"model._target_={target}"])


def test_a_model_runs_elsewhere_with_all_that_it_imports_from_beside_it(here, tmp_path):
    callback = compose(TrainJob, ["callbacks=[{_target_: loud.Loud}]"])
    assert own_packages(callback) == [here / "loud.py"]
    packages = own_packages(job())
    assert packages == [here / "net.py", here / "helpers.py", here / "pieces"]
    write_code(tmp_path / "code.tar", packages)
    with tarfile.open(tmp_path / "code.tar") as tar:
        tar.extractall(tmp_path, filter="data")
        own_files = {n for n in tar.getnames() if not n.startswith("code/forescale/")}
    assert own_files == {f"code/{n}" for n in FILES if n.startswith(("net", "help", "pieces/"))} - {
        "code/pieces/.cache/large.bin"
    }
    here.rename(tmp_path / "gone")
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import net, json; print(json.dumps(net.Net.sizes))"],
        env={"PYTHONPATH": str(tmp_path / "code")}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [3, 5], done.stderr


def test_a_file_that_the_library_or_an_installed_package_hides_is_not_taken(here):
    """It would hide them on the nodes, where the frozen code is searched first."""
    assert own_packages(job("notes.Any")) == [here / "notes.py"]
    assert here / "json.py" not in own_packages(job())


def test_a_sentence_names_what_is_frozen(here):
    packages = own_packages(job())
    size = sum(len(FILES[n]) for n in FILES if n.startswith(("net", "help", "pieces/"))) - 1
    assert described(packages) == (
        "your own code is frozen with the job: net.py, helpers.py, pieces/ "
        f"from {here} (5 files, {size / 1e3:.1f} kB)."
    )


def test_too_much_code_is_refused_with_where_it_lies(here, monkeypatch):
    with open(here / "pieces/weights.bin", "wb") as sparse:
        sparse.truncate(snapshot._LARGEST + 1)
    with pytest.raises(UserError) as caught:
        own_packages(job())
    assert str(caught.value) == (
        "model._target_: more than 64 MiB of files would be frozen with the job, of which 64.0 are "
        f"in {here / 'pieces'}; move data out of the package, or install it with pip."
    )


def test_a_file_that_is_no_python_ends_nothing(here):
    (here / "pieces/old.py").write_text("print 'of Python 2'\n")
    assert here / "pieces" in own_packages(job())


def test_the_code_runs_as_it_was(tmp_path):
    """From the tar alone: an edit of the checkout after the submission doesn't reach the job."""
    write_code(tmp_path / "code.tar", [])
    with tarfile.open(tmp_path / "code.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import forescale.slurm.batch as b; print(b.__file__)"],
        env={"PYTHONPATH": str(tmp_path / "code")}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "code/forescale/slurm/batch.py"), done.stderr
    assert (tmp_path / "code/forescale/slurm/job.sbatch.j2").exists()
    assert (tmp_path / "code/forescale/conf/train.yaml").exists()


def test_the_same_code_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_code(tmp_path / name, [])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_installed_model_stays_where_it_is():
    assert own_packages(compose(TrainJob, ["model._target_=torch.nn.Linear"])) == []
    assert own_packages(compose(TrainJob, [])) == []


def test_a_model_that_is_not_there_is_a_sentence():
    with pytest.raises(UserError, match="Python finds no module nowhere_at_all"):
        own_packages(compose(TrainJob, ["model._target_=nowhere_at_all.Net"]))


def test_a_packed_environment_runs_from_another_place(tmp_path):
    """A small virtual environment, packed as ours would be, once for each state of it."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    code = (
        "import sys; from pathlib import Path; "
        "from forescale.slurm.login.snapshot import pack_environment as p; "
    )
    code += "print(p(Path(sys.argv[1])))"
    packages = [path for path in sys.path if path.endswith("-packages")]
    write_code(tmp_path / "code.tar", [])
    with tarfile.open(tmp_path / "code.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "code"), *packages])}

    def packed():
        return subprocess.run(
            [venv / "bin/python", "-c", code, tmp_path / "tars"],
            env=environment, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip

    tar = packed()
    assert packed() == tar
    (installed,) = venv.glob("lib/python*/site-packages")  # while the clock is an hour behind
    os.utime(installed, (installed.stat().st_mtime - 3600,) * 2)
    assert packed() != tar
    (tmp_path / "there").mkdir()
    subprocess.run(["tar", "-xf", tar, "-C", tmp_path / "there"], check=True)
    venv.rename(tmp_path / "gone")
    done = subprocess.run(
        [tmp_path / "there/bin/python", "-c", "import sys; print(sys.prefix)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "there")


def test_outside_of_an_environment_there_is_nothing_to_pack(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    with pytest.raises(UserError, match="is not in a virtual environment"):
        pack_environment(tmp_path)
