"""Words that no sane user types, for every verb and all of its keys: each command ends with code 0
or 2 and, where it refuses, with a sentence.

Hypothesis draws the words; `cli.main` runs them in this process and in a scratch directory with a
small run, a dataset, tables and files that are none. What would start something real is kept from
it by words that come last and so count, or by what the machine lacks; not covered is therefore:

    train              beyond the opening of its data (plan reads the same keys, and all of them)
    submit             beyond the batch script (`--dry-run`)
    drill, shards      beyond their keys (a scenario that doesn't exist; an output that isn't one)
    study launch       beyond the reading of the study
    generate, eval     more than two tokens or windows
    serve              beyond its keys (a run that doesn't exist)
    status, study      `live`, which never ends; logs: `follow`, which waits for a run
    all                addresses (http, s3, hf), which would leave the machine

Keys that name what to write get no device: a test must not replace /dev/null. FORESCALE_WORDS=10000
draws more, and others each time.
"""

import contextlib
import io
import os
import resource
import shutil
import string
from functools import cache
from typing import Literal, get_args, get_origin

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forescale import cli
from forescale.config.compose import groups
from forescale.config.duration import Duration
from forescale.config.schema import leaves, options
from forescale.ground.errors import DONE, USER
from forescale.verbs import VERBS, load

EXAMPLES = int(os.environ.get("FORESCALE_WORDS", "0"))
HARMLESS = {  # what comes last, so that nothing real starts
    "train": ["data.path=missing", "data.sources={}"],
    "submit": ["--dry-run"],
    "drill": ["scenarios=[none]"],
    "shards": ["output=folder"],
    "generate": ["num_tokens=2"],
    "serve": ["target=missing"],
    "eval": ["windows=2"],
    "status": ["live=false"],
    "logs": ["follow=false"],
    "study launch": ["study=missing"],
    "shards show": [],
}
# A tenth of a second or more.
HEAVY = ("train", "plan", "submit", "study", "doctor", "generate", "eval")
OUTPUTS = {"to", "output", "json", "data.cache", "run.root", "studies"}
_TABLE = ["points.csv", "bootstraps=100"]
_TARGET = ["target.parameters=1e7", "target.tokens=3e8"]
STARTS = {
    "train": [["x"], ["x", "data.path=dataset"]],
    "plan": [[], ["data.path=dataset"], ["data.path=dataset", "machine=cpu"],
             ["data.path=dataset", "experiment=gpus64"], ["model=llama-1b", "plan.gpus=64"]],
    "submit": [["train", "data.path=dataset", "machine=cpu"], ["train", "x", "slurm.nodes=2"]],
    "study": [
        *(["fit", *_TABLE], ["fit", *_TABLE, *_TARGET], ["fit", "bad.csv"], ["fit"]),
        *(["report", *_TABLE, "to=report.html"], ["predict", *_TABLE, "target.run=x", *_TARGET]),
        *(["next", *_TABLE, "cap=1e15", *_TARGET], ["records", "runs/*"], ["score", "small"]),
        *(["records", "points.csv"], ["records", "small"], ["plan", "study=x", "plan.cap=1e14"]),
        *(["launch"], ["status"], ["sync"], ["exclude", "cells=[a]", "why=b"], []),
    ],
    "shards": [["folder"], ["show", "dataset"], []],
    "export": [["small", "to=exported"], ["small"]],
    "pin": [["small", "step=4"], ["small"]],
    "status": [[], ["small"], ["--json"], ["run.root=runs"]],
    "completion": [["bash"], ["--words"], ["--words", "train"]],
    "doctor": [[]],
    "drill": [[]],
}  # fmt: skip
NUMBERS = [
    *("0", "-0", "-1", "1", "2", "3", "8", "0.5", "1e9", "1e18", "1e30", "1e300", "1e308", "1e400"),
    *("1e-9", "1e-30", "1e-300", "5e-324", "-1e308", "nan", "inf", "-inf", ".nan", "1_000", "0x10"),
    *("9" * 19, "9" * 400, "9" * 5000, "1." + "0" * 400, "1e", "7,503,872", "7.5M", "½", "٣"),
]
TEXTS = [
    *("", " ", "null", "true", "off", "~", "???", "${train.steps}", "${a.b}", "${"),
    *("${oc.env:HOME}", "[", "]", "{", "}", "[]", "{}", "[[]]", "[null]", "{a: 1}"),
    *("{a: {b: 1}}", "{1: 2}", "a,b", "'", '"', "\\", "''", "a=b", "=", "\x00", "\n"),
    *("a\nb", "\r", "\x1b[2J", "\x9b", "\u202e", "\ufeff", "\udcff", "caf\udce9", "naïve"),
    *("数据", "🙂", "a" * 300, "b" * 70_000, "*", "**", "[!", "a/*"),
    *("[" * 60, "[" * 3000, "{a: " * 60, "[" * 60 + "]" * 60, "{a: " * 2000 + "1" + "}" * 2000),
    *("500 steps", "1e300 tokens", "30 min", "1e-300 s", "0 %", "200 %", "1e308 d"),
    "9" * 400 + " s",
    *("os.path.join", "missing.Model", "a.b", "torch.nn.Linear", "builtins.int", "kill@1", "1:2"),
    *("[{_target_: a.b}]", "{_target_: os.path.join}", "[1, a, null]", "[[1, 2]]", "[[2, 1], [0]]"),
    *("{data: dataset}", "{data: 1}", "{data: nan}", "{loss: final}", "{loss: loss}", "[s0-n0]"),
    *("points", "small", "[points.csv]", "[small]", "&a [*a]", "!!python/name:os.system", "- a"),
]
PATHS = [
    *("small", "runs/small", "runs", "dataset", "folder", "folder/", "file", "points.csv", "."),
    *("runs/small/checkpoints/step-00000004", "bad.csv", "bombs", "deep.json", "aliases.yaml"),
    *("..", "/", "missing", "missing/deep", "file/below", "~", "~nobody-here/x", "caf\udce9"),
    "loop",
    *("/proc", "/proc/self", "/proc/self/mem", "/proc/1/environ", "/sys", "a" * 300, "a/" * 3000),
    *("empty", "\x00", "a\nb", "noise", "aliases", "nested", "numbers", "rows", "rows/rows"),
]
DEVICES = ["/dev", "/dev/zero", "/dev/null", "/dev/full", "/dev/random", "/dev/stdin"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory, small_data, trained):
    path = tmp_path_factory.mktemp("words")
    shutil.copytree(small_data, path / "dataset")
    for name in ("small", "noise", "aliases", "nested", "numbers", "rows"):
        shutil.copytree(trained.path, path / "runs" / name, symlinks=True)
    fill(path)
    most, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = psutil.Process().memory_info().vms + (8 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (room, hard))  # a greedy word fails, and not the machine
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for name in ("HOME", "FORESCALE_CACHE"):  # the words name ~, and no key a cache
            patch.setenv(name, str(path / name))
        yield
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def fill(path):
    """Put files into a directory of runs that are none, or that are not well."""
    runs, bomb = path / "runs", "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for one, before in zip("bcdefghi", "abcdefgh", strict=True):
        bomb += f"{one}: &{one} [{', '.join([f'*{before}'] * 9)}]\n"
    (runs / "noise" / "config.yaml").write_bytes(b"\xff\x00\x1b[2J")
    (runs / "aliases" / "config.yaml").write_text(bomb)
    (runs / "nested" / "config.yaml").write_text("a: " + "[" * 5000)
    (runs / "nested" / "run.json").write_text("[" * 100_000)
    config = (runs / "small" / "config.yaml").read_text()
    huge = config.replace("steps: 8", "steps: " + "9" * 400)
    (runs / "numbers" / "config.yaml").write_text(huge.partition("\n")[2])
    (runs / "rows" / "run.json").write_text("{}")
    for rows in (runs / "rows" / "attempts").glob("*/*.jsonl"):
        rows.write_text("[" * 100_000 + '\n{"kind": "train"}\n\x1b[2J\n')
    shutil.copytree(runs / "small" / "checkpoints", runs / "caf\udce9" / "checkpoints")
    shutil.copy(runs / "small" / "config.yaml", runs / "caf\udce9")
    for checkpoint in list((runs / "small" / "checkpoints").iterdir()):
        shutil.copytree(checkpoint, f"{checkpoint}.bak")
    shutil.copytree(runs / "small" / "attempts" / "0001", runs / "small" / "attempts" / "0001.bak")
    (path / "folder").mkdir()
    (path / "empty").write_bytes(b"")
    (path / "file").write_text("some text\n")
    (path / "loop").symlink_to("loop")
    (path / "deep.json").write_text("[" * 100_000)
    (path / "aliases.yaml").write_text(bomb)
    (path / "bombs").write_text("train.steps=" + "[" * 3000 + "\nsecond \x00\n")
    cells = ["7,503,872", "7.5M", "", "nan", "-1", "1e400", "9" * 400, "0", "\x1b[2J"]
    lines = [f'"{a}","{b}",3.1,1e15' for a in cells for b in cells]
    (path / "bad.csv").write_text("parameters,tokens,loss,budget\n" + "\n".join(lines) + "\n")
    points = [(n, 20 * n * m, 1.7 + 400 / n**0.34 + 400 / (20 * n * m) ** 0.28)
              for n in (1e6, 2e6, 4e6, 8e6) for m in (1, 2, 4)]  # fmt: skip
    rows = [f"{n},{d},{loss},{6 * n * d}" for n, d, loss in points]
    (path / "points.csv").write_text("parameters,tokens,loss,flops\n" + "\n".join(rows) + "\n")
    return path


def values(name, leaf=None):
    """A strategy for what is typed behind `name=`; of a known key mostly what its type takes."""
    return values_of(name in OUTPUTS, options(leaf.type) if leaf else ())


@cache  # to make them for each of 1,600 keys took longer than many commands
def values_of(is_output, types):
    paths = PATHS if is_output else [*PATHS, *DEVICES]
    usual = st.one_of(
        st.integers(0, 40).map(lambda n: 2**n), st.integers(-12, 24).map(lambda n: 10.0**n)
    )
    numbers = st.one_of(
        st.sampled_from(NUMBERS), usual.map(str), usual.map(str), st.floats().map(repr)
    )
    texts = st.sampled_from([*TEXTS, *paths])
    if not is_output:
        texts = st.one_of(texts, texts, st.text(st.characters(), max_size=30))
    anything = st.one_of(texts, texts, numbers)
    if {int, float} & {*types}:
        return st.one_of(numbers, numbers, numbers, anything)
    if choices := [str(c) for t in types if get_origin(t) is Literal for c in get_args(t)]:
        return st.one_of(*[st.sampled_from(choices)] * 3, anything)
    if Duration in types:
        unit = st.sampled_from(["", " steps", " tokens", " s", " min", " d", " %", " parsec"])
        return st.one_of(*[st.tuples(numbers, unit).map("".join)] * 3, anything)
    return st.one_of(st.sampled_from(["true", "false"]), anything) if bool in types else anything


@cache
def keys(verb):
    """A strategy for KEY=VALUE of a verb."""
    job = load(verb).JOB
    known = leaves(job)
    choices = {name: [*group.files, "none"] for name, group in groups(job).items()}
    right = [st.tuples(st.just(name), values(name, leaf)) for name, leaf in known.items()]
    right += [st.tuples(st.just(name), st.sampled_from(files)) for name, files in choices.items()]
    wrong = st.tuples(st.text(string.ascii_letters + "._-+~ =", max_size=12), values("any"))
    return st.integers(0, 15).flatmap(lambda n: st.one_of(right) if n else wrong).map("=".join)


def harmless(verb, *words):
    """What comes last in a command."""
    return HARMLESS.get(" ".join([verb, *words[:1]]), HARMLESS.get(verb, []))


@cache
def commands(verb):
    """A strategy for the words after a verb: mostly some that would do, and a few odd ones."""
    job = load(verb).JOB
    bare = st.sampled_from([*PATHS, *DEVICES, *job.FLAGS, "--help", "-m", "", "--", "x"])
    odd = st.integers(0, 7).flatmap(lambda n: keys(verb) if n else bare)
    start = st.sampled_from(STARTS.get(verb, [["small"]]))
    return st.tuples(start, st.lists(odd, max_size=2)).map(
        lambda parts: [*parts[0], *parts[1], *harmless(verb, *parts[0])]
    )


def lines(verbs):
    """A strategy for whole commands of these verbs."""
    return st.sampled_from(verbs).flatmap(
        lambda verb: commands(verb).map(lambda words: [verb, *words])
    )


@cache  # one of seven commands is drawn twice
def expect_a_sentence(*words):
    """Run a command; assert its code, and that what it refuses is said in sentences."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([*words])
    printed = err.getvalue()
    assert code in (DONE, USER)
    assert "Traceback" not in out.getvalue() + printed
    assert not set("\x1b\x07\x9b") & set(out.getvalue() + printed)
    _, begins, message = printed.partition("forescale: ")
    if code == USER and not begins:
        assert words[0] in ("check", "doctor")  # they list the faults that they find
        assert "ault" in out.getvalue() + printed
    for sentence in message.splitlines() if code == USER else ():
        assert sentence.endswith((".", "?"))
        assert len(sentence) < 4000


def drawn(count):
    """The settings of a test of so many commands: always the same, unless more are asked for."""
    odd = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=EXAMPLES or count,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=odd,
    )


@drawn(40)
@given(lines([verb for verb in VERBS if verb not in HEAVY]))
def test_some_words_end_in_a_sentence(scratch, words):
    expect_a_sentence(*words)


@pytest.mark.slow  # a thousand commands, about a minute
@pytest.mark.timeout(0 if EXAMPLES else 1200)  # a hang; how long it takes is the machine's affair
@drawn(1000)
@given(lines([*VERBS]))
def test_a_thousand_words_end_in_a_sentence(scratch, words):
    expect_a_sentence(*words)
