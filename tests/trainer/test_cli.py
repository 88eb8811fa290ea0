"""The command line itself: which words are a target, and which codes faults end with."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forescale import cli
from forescale.config.compose import compose
from forescale.config.job import overrides_of
from forescale.ground.errors import CRASHED, INTERRUPTED, USER, UserError
from forescale.resilience import outcome
from forescale.run.directory import Run
from forescale.run.start import versions
from forescale.verbs import SYNONYMS, load
from forescale.verbs.shards import ShardsJob

ROOT = Path(__file__).parents[2]


@pytest.fixture
def verb(monkeypatch):
    """Put a function in the place of a verb's main."""

    def put(name, function):
        import importlib

        monkeypatch.setattr(importlib.import_module(f"forescale.verbs.{name}"), "main", function)

    return put


def failing(error):
    def main(words):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a.yaml", "is bad", "mend it"), USER, "forescale: a.yaml: is bad; mend it.\n"),
        (OSError(errno.ENOSPC, "x", "/d/f"), USER, "forescale: /d/f: the disk is full; free some"),
        (
            OSError(errno.EROFS, "x", "/d"),
            USER,
            "forescale: /d: the file system is read-only; choose",
        ),
        (
            OSError(errno.ENAMETOOLONG, "x", "/d"),
            USER,
            "forescale: /d: the name is too long; choose",
        ),
        (MemoryError("7 GiB"), USER, "forescale: status: not enough memory (7 GiB); make what you"),
        (
            OSError(errno.ESTALE, "Stale file handle", "/d"),
            CRASHED,
            "forescale: /d: the storage fails (Stale file handle); check the storage, then run",
        ),
        (
            KeyboardInterrupt(),
            INTERRUPTED,
            "forescale: interrupted; run the same command again to resume.\n",
        ),
    ],
)
def test_a_fault_that_is_not_ours_is_one_sentence(forescale, verb, error, code, message):
    for name in ("status", "train"):
        verb(name, failing(error))
        got, out, err = forescale(name)
        assert (got, out) == (code, "")
        assert err.startswith(message.replace("status", name))
        assert err.count("\n") == 1


def test_a_home_of_nobody_is_a_sentence(forescale):
    code, _, err = forescale("status", "target=~nobody-here/run")
    assert code == USER
    assert err.endswith("a path begins with ~ and a name that is no user's; write the full path.\n")


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.ENOTCONN, "x")])
def test_a_fault_of_ours_keeps_its_traceback(forescale, verb, error):
    verb("status", failing(error))
    with pytest.raises(type(error)):
        forescale("status")


@pytest.mark.parametrize(("name", "code"), [("status", 0), ("train", INTERRUPTED)])
def test_a_reader_who_had_enough_is_no_fault(name, code):
    """As in `forescale status | head`; a training that ends so is not done."""
    body = (
        "import sys, forescale.verbs.status as s, forescale.verbs.train as t\n"
        "from forescale import cli\n"
        "def main(words):\n"
        "    while True: print('x' * 10)\n"
        "s.main = t.main = main\n"
        f"sys.exit(cli.main(['{name}']))\n"
    )
    environment = {**os.environ}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    process = subprocess.Popen([sys.executable, "-c", body], **pipe)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == code


@pytest.mark.parametrize(
    ("word", "todo"),
    [
        ("trian", "did you mean forescale train?"),
        ("evaluate", "did you mean forescale eval?"),
        ("chat", "did you mean forescale generate RUN --chat --interactive?"),
        ("kill", "did you mean forescale stop RUN?"),
        ("foo", "forescale --help lists them all."),
    ],
)
def test_a_wrong_verb_is_answered_with_what_is_probably_meant(forescale, word, todo):
    assert forescale(word) == (USER, "", f"forescale: {word}: no such verb; {todo}\n")


def test_each_other_word_for_a_verb_names_one_that_is_there():
    for words, typed in SYNONYMS.items():
        assert not {*words.split()} & {*cli.VERBS}
        assert typed.split()[0] in {*cli.VERBS, "-V"}


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_page(forescale, words):
    code, out, err = forescale(*words)
    assert (code, err) == (0, "")
    for name, purpose in cli.VERBS.items():
        assert f"{name} " in out
        assert purpose in out


def test_the_version(forescale):
    for word in ("--version", "-V"):
        code, out, _ = forescale(word)
        assert code == 0
        assert out == f"{versions()['forescale']}\n"  # "unknown" where it isn't installed


def test_a_mistyped_flag_is_named(forescale):
    assert "--hepl: is not KEY=VALUE; did you mean --help?" in forescale.refuses("train", "--hepl")
    assert "did you mean --open?" in forescale.refuses("serve", "first", "--opn")


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_a_page_of_its_own(forescale, name):
    code, out, err = forescale(name, "--help")
    assert (code, err) == (0, "")
    assert f"forescale {name}" in out


@pytest.mark.parametrize(
    ("verb_name", "words", "overrides"),
    [
        ("train", ["mine"], ["run.name='mine'"]),
        ("train", ["mine", "train.steps=3"], ["run.name='mine'", "train.steps=3"]),
        ("train", ["a/b/mine"], ["run.root='a/b'", "run.name='mine'"]),
        ("train", ["/mine/"], ["run.root='/'", "run.name='mine'"]),
        ("train", ["optimizer=adamw"], ["optimizer=adamw"]),
        ("generate", ["runs/a", "prompt=def x"], ["target='runs/a'", "prompt=def x"]),
        ("shards", ["a.txt", "b's", "output=d"], [r"input=['a.txt','b\'s']", "output=d"]),
        ("train", ["-m"], ["-m"]),
    ],
)
def test_a_bare_word_is_the_target(verb_name, words, overrides):
    assert overrides_of(load(verb_name).JOB, words) == overrides


@pytest.mark.parametrize(
    ("verb_name", "words", "message"),
    [
        ("train", ["a", "b"], "train takes one name, not 2"),
        ("doctor", ["a"], "doctor takes no name"),
    ],
)
def test_words_too_many_are_refused(verb_name, words, message):
    with pytest.raises(UserError, match=message):
        overrides_of(load(verb_name).JOB, words)


@pytest.mark.parametrize(
    "text", ["it's", "a,b", "{x}", "a b", r"a\b", r"a\'b", "end\\", "ü", "null", "3"]
)
def test_any_path_reaches_the_job_unchanged(text):
    job = compose(ShardsJob, [*overrides_of(ShardsJob, [text, "other"]), "output=d"])
    assert job.input == [text, "other"]


def test_several_runs_at_once_are_pointed_to_studies(forescale):
    code, _, err = forescale("train", "-m", "train.seed=1,2")
    assert code == USER
    assert "study" in err


def test_what_is_said_stands_in_a_log_in_the_order_in_which_it_was_said(tmp_path):
    """Two streams into one file, as a batch system has it; nothing else makes Python hurry."""
    code = (
        "import sys; from forescale import cli\n"
        "def said(words): print('first'); print('second', file=sys.stderr); print('third')\n"
        "cli._dispatch = said; cli.main([])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open(tmp_path / "log", "w") as log:
        subprocess.run(
            [sys.executable, "-c", code], stdout=log, stderr=log, env=environment, check=True
        )
    assert (tmp_path / "log").read_text().split() == ["first", "second", "third"]


CONTROL = "\x1b]0;title\x07\x1b[2J\x9b31m"
VISIBLE = r"\x1b]0;title\x07\x1b[2J\x9b31m"


@pytest.fixture
def hostile(own_run):
    """A run with control characters in its name, a log, an event and the end of its attempt."""
    path = own_run.path.with_name(f"a{CONTROL}\udcff")
    shutil.move(own_run.path, path)
    run = Run(path)
    attempt = run.attempts()[-1]
    (attempt.path / "rank-0.log").write_text(f"step {CONTROL}\n")
    attempt.event(f"found {CONTROL}")
    outcome.record_start(attempt.path, ["x"], 2)
    outcome.record_end(attempt.path, 1, f"ValueError {CONTROL}", 1)
    return run


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("status", "RUN"),
        ("logs", "RUN"),
        ("check", "RUN"),
        ("pin", "RUN", "step=4"),
        ("generate", "none"),  # the message lists the runs
        ("study", "fit", "points.csv"),
    ],
)
def test_a_verb_shows_control_characters_as_text(hostile, forescale, words):
    (hostile.path.parent.parent / "points.csv").write_text(f"los{CONTROL}\n1\n")
    name = str(hostile.path)
    _, out, err = forescale(*(name if word == "RUN" else word for word in words))
    assert VISIBLE in out + err
    assert not set("\x1b\x07\x9b") & set(out + err)
    assert words[0] == "study" or r"\xff" in out + err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    """As in an installation without it: the import fails, whatever is installed here."""
    names = ("forescale.verbs.study", "forescale.scaling")
    for name in [n for n in sys.modules if n.startswith(names)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert cli.main(["study", "fit"]) == 2
    assert capsys.readouterr().err == (
        "forescale: forescale study: needs pandas, which isn't installed; "
        "pip install 'forescale[study]'.\n"
    )


@pytest.mark.parametrize("module", ["forescale", "forescale.cli"])
def test_the_file_of_the_command_line_runs_as_the_package_does(module, tmp_path):
    """Also where the working directory has a file of the name of one of Python's."""
    (tmp_path / "random.py").write_text('raise SystemExit("replaced")\n')
    command = [sys.executable, "-m", module]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    assert "forescale VERB [TARGET]" in subprocess.run([*command, "--help"], **how).stdout
    done = subprocess.run([*command, "trian"], **how)
    assert done.returncode == USER
    assert "no such verb; did you mean forescale train?" in done.stderr
