"""Candidates, and the scripts as real shells run them."""

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forescale.config.compose import groups
from forescale.config.train import TrainJob
from forescale.verbs import VERBS
from forescale.verbs.completion import candidates

BIN = Path(sys.executable).parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with two runs and a file."""
    for name in ("first", "fifth"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    (tmp_path / "runs" / "no-run").mkdir()
    (tmp_path / "zebra.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["tra"], ["train"]),
        (["--v"], ["--version"]),
        (["train", "tr"], ["train.", "trust="]),
        (["train", "train.steps"], ["train.steps="]),
        (["train", "run.from.r"], ["run.from.run="]),
        (["train", "model"], ["model.", "model="]),
        (["train", "model=ti"], ["model=tiny"]),
        (["train", "train.compile="], [f"train.compile={v}" for v in ("auto", "off", "on")]),
        (["train", "data.document_mask=t"], ["data.document_mask=true"]),
        (["train", "data.path="], []),
        (["train", "no.such.key="], []),
        (["train", "fi"], ["fifth", "first"]),
        (["eval", "x", "target=fi"], ["target=fifth", "target=first"]),
        (["status", "fir"], ["first"]),
        (["status", "run.root=elsewhere", "fir"], []),
        (["status", "--"], ["--help", "--json", "--live"]),
        (["submit", "trai"], ["train", "train."]),
        (["submit", "--d"], ["--dry-run"]),
        (["submit", "eval", "st"], ["steps="]),
        (["submit", "eval", "fi"], ["fifth", "first"]),
        (["completion", "z"], ["zsh"]),
        (["doctor", "zz"], []),
    ],
)
def test_candidates(here, line, expected):
    *before, last = line
    assert candidates(before, last) == expected


def test_all_verbs_and_all_choices_are_offered():
    assert set(VERBS) <= set(candidates([], ""))
    for name, group in groups(TrainJob).items():
        assert candidates(["train"], f"{name}=") == [f"{name}={c}" for c in sorted(group.files)]


def test_a_wrong_command_line_has_no_candidates(forescale):
    assert forescale("completion", "--words", "no-such-verb", "x") == (0, "", "")


def test_the_second_time_no_verb_is_imported(tmp_path, monkeypatch):
    """Since a TAB should take less than 0.2 s."""
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path))
    code = (
        "import sys; from forescale import cli\n"
        "cli.main(['completion', '--words', 'train', 'model='])\n"
        "print('hydra' in sys.modules, 'forescale.verbs.train' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert first.replace("True True", "False False") == second
    assert "model=tiny" in second
    assert first != second


def test_completing_imports_no_torch_and_composes_nothing():
    code = (
        "import sys; from forescale import cli\n"
        "cli.main(['completion', '--words', 'train', 'model='])\n"
        "assert not {'torch', 'hydra.core.global_hydra.GlobalHydra'} & set(sys.modules)\n"
        "from hydra.core.global_hydra import GlobalHydra\n"
        "import forescale.config.compose as c\n"
        "c.hydra_compose = None; cli.main(['completion', '--words', 'submit', 'slurm.'])\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True)


def test_the_shell_must_be_named(forescale):
    assert forescale("completion")[0] == 2
    assert "is not one of" in forescale.refuses("completion", "tcsh")


LINES = [
    ("forescale exp", "forescale export "),
    ("forescale train tra", "forescale train train."),
    ("forescale train model=ti", "forescale train model=tiny "),
    ("forescale train train.glo", "forescale train train.global_batch="),
    ("forescale generate fir", "forescale generate first "),
    ("forescale shards ze", "forescale shards zebra.txt "),
    ("forescale train data.path=ze", "forescale train data.path=zebra.txt "),
]


def typed(command: list[str], setup: str, lines: list[str]) -> list[str]:
    """What lines on a terminal become at TAB, one after the other."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(PS1="", TERM="dumb", HISTFILE="")
        os.execvp(command[0], command)
    # Ctrl-A and Ctrl-E put the completed line in quotes, which echo then prints.
    keys = "".join(f"{line}\t\x01echo 'got<\x05>'\n" for line in lines)
    os.write(terminal, f"{setup}\n{keys}exit\n".encode())
    output = b""
    try:
        while data := os.read(terminal, 4096):
            output += data
    except OSError:  # the shell has closed the terminal
        pass
    os.waitpid(pid, 0)
    printed = [text for text in output.decode().splitlines() if text.startswith("got<")]
    return [text.partition("got<")[2].partition(">")[0].rstrip() for text in printed]


@pytest.mark.parametrize(
    ("shell", "options"), [("bash", ["--norc", "--noprofile"]), ("zsh", ["-f"])]
)
def test_a_terminal_completes_a_line(here, shell, options):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    setup = f'eval "$(forescale completion {shell})"; bindkey -e 2>/dev/null'
    lines, expected = zip(*LINES, strict=True)
    completed = typed([shell, *options, "-i"], setup, lines)
    assert completed == [line.rstrip() for line in expected]
