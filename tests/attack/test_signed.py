"""Values of a wrong type in the metadata of a run, a dataset or a study whose checksums agree with
them, as a stranger or a faulty writer can make them: every verb that reads them ends with code 0 or
2, with one sentence and no traceback, a list of runs still shows the others, and no page runs a
script of theirs.

All verbs run in this process. The fast tests take a few values of a file, the slow ones hundreds.
"""

import copy
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from forescale import cli
from forescale.checkpoint.choice import newest_complete
from forescale.ground.errors import UserError
from forescale.ground.storage import (
    FileEntry,
    read_json,
    read_table,
    write_checked_json,
    write_file,
    write_json,
    write_table,
)
from forescale.resilience.diagnosis import Hang, publish_hang
from forescale.resilience.heartbeat import Heartbeat, RankStatus, write_node
from forescale.run.directory import Run
from forescale.run.forecast import hash_of
from forescale.run.history import Saved, expect_whole, history_of
from forescale.run.rows import RowWriter, read_rows
from forescale.run.start import start
from tests.attack import test_small_files
from tests.attack.test_small_files import HEAVY, LIGHT
from tests.matrix import FULL
from tests.questions import rows, write_rows
from tests.trainer.scaling.conftest import fake_training  # noqa: F401
from tests.trainer.small_run import make_job

exportable, two_launches = test_small_files.exportable, test_small_files.run
DEEP: list = []
for _ in range(300):
    DEEP = [DEEP]
SOME = 60 if FULL else 20  # changes of a file
HOSTILE = "<img src=x onerror=alert(1)>\x1b[2J"
WRONG = (None, True, HOSTILE, "", [], {}, [None], {"x": 1}, -1, 1.5, 1e400, 10**30, 2**62, DEEP)
FILES = (
    "checkpoints/step-00000004/state.json",
    "run.json",
    *(f"attempts/{n}/{name}.json" for n in ("0001", "0002") for name in ("parent", "launch")),
    *(f"attempts/{n}/{name}.jsonl" for n in ("0001", "0002") for name in ("metrics", "events")),
    *("checkpoints/step-00000004/files.json", "attempts/0002/hang.json", "mirror.json"),
    *("attempts/0002/heartbeat/a.json", "imported.json", "references.json", "chat.json"),
)
VERBS = (
    *LIGHT,
    *HEAVY,
    ("average", "small", "run.name=mean", "last=1"),
    ("status", "small", "--json"),
    ("finetune", "small", "data=chat.jsonl", "run.name=tuned", "prepare_only=true"),
)
OF_DATASET = (
    ("check", "dataset"),
    ("shards", "show", "dataset"),
    ("plan", "data.path=dataset", "train.sequence_length=32", "machine=cpu"),
)
OF_STUDY = (
    *(("study", action, "study=a") for action in ("status", "sync", "records", "launch", "score")),
    ("study", "fit", "study=a"),
    ("study", "exclude", "study=a", "cells=[n0-x1]", "why=heat"),
    ("study", "predict", "study=a", "target.run=b", "target.parameters=9e4", "target.tokens=3e6"),
    ("study", "report", "study=a"),
)
STUDY_FILES = ("plan.json", "study.yaml", "events.jsonl", "forecasts/0001.json",
               "forecasts/0001.outcome.json")  # fmt: skip
LIST = ("plan.kind=list", "plan.runs=[[1e4,1e5],[2e4,1e5],[4e4,1e5]]", "plan.cap=1e13")
PLAN = (
    *("plan.kind=ladder", "plan.ladder=[1e4,2e4,4e4]", "plan.multiples=[0.5,1]", "plan.cap=1e13"),
    *("plan.seeds=[2,1]", "plan.sequence_length=32", "form=shared-exponent", "bootstraps=100"),
    *("near=null", "target.parameters=6e4", "target.tokens=3e6"),
)


def places(value: Any, path: tuple = (), depth: int = 5) -> Iterator[tuple]:
    """Yield the path of every value, of a long list or mapping those of its first two items."""
    if path:
        yield path
    if isinstance(value, dict | list) and depth:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        is_record = isinstance(value, dict) and len(value) < 30
        for name, inner in list(items)[: 30 if is_record else 2]:
            yield from places(inner, (*path, name), depth - 1)


def changed(value: Any, path: tuple, *wrong: Any) -> Any:
    """Return a copy of a value with another value at a path; without one, with nothing there."""
    if not path:
        return wrong[0]
    result = copy.deepcopy(value)
    node = result
    for name in path[:-1]:
        node = node[name]
    if wrong:
        node[path[-1]] = wrong[0]
    else:
        del node[path[-1]]
    return result


def mutations(value: Any) -> list[tuple[tuple, tuple]]:
    """Return (path, wrong value) of every change; an empty tuple removes the value."""
    paths = list(places(value))
    wrong = [((), (each,)) for each in WRONG]
    return wrong + [(path, each) for path in paths for each in ((), *((w,) for w in WRONG))]


class Signed:
    """A file of metadata, of which `write` makes another content whose checksums agree. Of a file
    of rows the content is the last row of each kind."""

    def __init__(self, path: Path):
        self.path, self.rows = path, read_rows(path) if path.suffix == ".jsonl" else []
        self.last = {row["kind"]: n for n, row in enumerate(self.rows)}
        self.content = {kind: self.rows[n] for kind, n in self.last.items()}
        self.content = self.content or self.read()
        table = path.with_name("files.json")
        self.before = {p: p.read_bytes() for p in (path, table) if p.exists()}

    def read(self) -> Any:
        is_yaml = self.path.suffix == ".yaml"
        return yaml.safe_load(self.path.read_bytes()) if is_yaml else read_json(self.path)

    def restore(self) -> None:
        for path, raw in self.before.items():
            path.write_bytes(raw)

    def write(self, value: Any) -> None:
        if self.path.name in ("state.json", "manifest.json", "origins.json"):
            table = read_table(self.path.parent)
            table[self.path.name] = write_json(self.path, value)
            write_table(self.path.parent, table)
        elif self.path.suffix == ".yaml":
            write_file(self.path, yaml.safe_dump(value).encode())
        elif self.path.parent.name == "forecasts" and self.path.stem.isdigit():
            signed = {**value, "hash": hash_of(value)} if isinstance(value, dict) else value
            write_json(self.path, signed)
        elif self.rows:
            self.write_rows(value if isinstance(value, dict) else {})
        elif isinstance(value, dict) and self.path.name not in ("plan.json", "0001.outcome.json"):
            write_checked_json(self.path, value)
        else:
            write_json(self.path, value)

    def write_rows(self, last: dict[str, Any]) -> None:
        writer, kinds = RowWriter(self.path.with_name("new")), {n: k for k, n in self.last.items()}
        for n, row in enumerate(self.rows):
            if isinstance(new := last.get(kinds[n]) if n in kinds else row, dict):
                writer.add(new)
        self.path.write_bytes(writer.path.read_bytes() if writer.path.exists() else b"")
        writer.path.unlink(missing_ok=True)


@pytest.fixture
def attacked(two_launches) -> Run:
    """A run of two launches, beside another one, with one of each small file."""
    shutil.copytree(two_launches.path, "runs/other", symlinks=True)
    attempt = two_launches.attempts()[-1].path
    publish_hang(attempt, Hang((1,), "a", "data", 6, 9.0, "rank 1 hung"))
    beat = Heartbeat(0, "a", 1, 1e9, 1e9, 6, "compute", "data", 0.1, 60.0, 60.0, False, {"data": 1})
    write_node(attempt, "a", [RankStatus(beat, 0.5)])
    write_json(two_launches.mirror, {"where": "/mirror", "steps": [4], "error": None})
    write_checked_json(two_launches.chat, {"chat_template": "{{ messages }}"})
    files = {"config.json": {"model_type": "llama"}, "tokenizer_config.json": {"eos_token": "x"}}
    write_checked_json(two_launches.imported, files)
    write_rows(Path("chat.jsonl"), rows())
    source = {"data": {"data": "0"}, "columns": 32}
    write_checked_json(two_launches.references, {"made": source, "values": {"train": {"data": ""}}})
    return two_launches


def resume(run: Run, data: str) -> None:
    """What `train` reads when it goes on with a run, without an engine."""
    again = Run(shutil.copytree(run.path, "resumed/small", symlinks=True))
    try:
        start(make_job(Path(data), Path("resumed")))
        checkpoint = newest_complete(again, lambda kind, **facts: None)
        assert checkpoint is not None
        entry = FileEntry(**checkpoint.state["logged"]["metrics.jsonl"])
        saved = Saved(checkpoint.position.step, checkpoint.attempt, entry)
        expect_whole(again, again.new_attempt(), saved)
        again.skipped(), again.rollbacks(), history_of(again, saved)
        [*map(checkpoint.merged, checkpoint.weights())]
    except (UserError, KeyError) as e:
        missing = isinstance(e, KeyError) and e.args[0] in ("logged", "metrics.jsonl")  # allowed
        assert missing or (isinstance(e, UserError) and "\n" not in str(e))  # noqa: PT017
    finally:
        shutil.rmtree("resumed")


def faults_of(forescale, words: tuple[str, ...]) -> Iterator[str]:
    """Yield what is wrong with the end of a command."""
    for folder in ("exported", "runs/mean", "runs/tuned"):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        code, out, err = forescale(*words)
    except Exception as e:
        yield f"raised {type(e).__name__}: {e}"
        return
    if code not in (0, 2) or "Traceback" in err + out:
        yield f"ended with {code}: {err[-300:]}"
    lines = [line for line in err.splitlines() if line.startswith("forescale: ")]
    if code == 2 and words[0] != "check" and len(lines) != 1:
        yield f"has no one sentence: {err[-300:]!r}"
    for page in Path().rglob("*.html"):
        if "<img src=x" in page.read_text(errors="replace"):
            yield "runs a stranger's script"
        page.unlink()
    if words == ("status",) and (code or "other" not in out):
        yield f"hides the other run: {out} {err}"


def attack(
    forescale, file: Path, number: int, count: int, verbs: tuple = VERBS,
    train: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Meet `number` changes of a file, each with some verbs in turn, and resumption."""
    signed, faults = Signed(file), []
    every = mutations(signed.content)
    chosen = random.Random(str(file)).sample(every, min(number, len(every)))
    for n, (path, wrong) in enumerate(chosen):
        signed.write(changed(signed.content, path, *wrong))
        where = f"{file}: {'.'.join(map(str, path))} = {repr(wrong)[1:30]}"
        for i in range(count):
            words = verbs[(n + 3 * i) % len(verbs)]
            faults += [f"{where}: {words[:2]} {fault}" for fault in faults_of(forescale, words)]
        try:
            train()
        except Exception as e:
            faults.append(f"{where}: train raised {type(e).__name__}: {e}")
        signed.restore()
    assert not faults, "\n".join(faults)


def attack_run(forescale, run: Run, file: str, number: int, count: int) -> None:
    data = read_json(run.identity)["dataset"]["path"]
    attack(forescale, run.path / file, number, count, train=partial(resume, run, data))


@pytest.mark.parametrize("file", [FILES[0], FILES[-2]])
def test_a_few_wrong_values_with_right_checksums(attacked, forescale, file):
    attack_run(forescale, attacked, file, 6, 1)


@pytest.mark.slow  # some thousand commands
@pytest.mark.parametrize("file", FILES)
def test_wrong_values_with_right_checksums_end_in_a_sentence_in_every_verb(
    attacked, forescale, file
):
    attack_run(forescale, attacked, file, SOME, 4)


@pytest.fixture
def dataset(small_data, tmp_path, monkeypatch) -> Path:
    """A copy of a dataset in the current directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(small_data, "dataset"))


def test_a_few_wrong_values_in_a_manifest(dataset, forescale):
    attack(forescale, dataset / "manifest.json", 20, 1, OF_DATASET)


@pytest.mark.slow  # some hundred commands
@pytest.mark.parametrize("file", ["manifest.json", "origins.json"])
def test_wrong_values_in_a_dataset_end_in_a_sentence(dataset, forescale, file):
    attack(forescale, dataset / file, 2 * SOME, 3, OF_DATASET)


def plan(small_data: Path, *words: str) -> Path:
    data = f"data.path={small_data}"
    assert cli.main(["study", "plan", "study=a", *words, "--", data, "optimizer=adamw"]) == 0
    return Path("studies/a")


@pytest.fixture
def planned(small_data, tmp_path, monkeypatch) -> Path:
    """A study that was planned in the current directory."""
    monkeypatch.chdir(tmp_path)
    return plan(small_data, *LIST)


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory, fake_training) -> Path:  # noqa: F811
    """The folder of a study that was launched to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("studies"))
        study = plan(small_data, *PLAN)
        assert cli.main(["study", "launch", "study=a", "launch.target=true"]) == 0
        return study.absolute()


def test_a_few_wrong_values_in_a_plan(planned, forescale):
    attack(forescale, planned / "plan.json", 20, 1, OF_STUDY[:3])


@pytest.mark.slow  # some hundred commands
@pytest.mark.parametrize("file", STUDY_FILES)
def test_wrong_values_in_a_study_end_in_a_sentence(whole, tmp_path, monkeypatch, forescale, file):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "studies/a", symlinks=True)
    attack(forescale, Path("studies/a", file), SOME, 2, OF_STUDY)


def test_a_stored_study_writes_nothing_outside_of_itself(
    planned,
    forescale,
    fake_training,  # noqa: F811
):
    """Neither by a key of its settings, nor by a link in place of a file that is added to."""
    safe = Path("safe")
    safe.write_text("as it was\n")
    settings = planned / "study.yaml"
    settings.write_text(settings.read_text().replace("to: null", f"to: {safe.absolute()}"))
    forescale("study", "report", "study=a")
    (planned / "logs").mkdir()
    for file in (planned / "logs/r0.log", planned / "events.jsonl"):
        file.unlink(missing_ok=True)
        file.symlink_to(safe.absolute())
        code, _, err = forescale("study", "launch", "study=a")
        assert (code, str(file) in err) == (2, True)
        file.unlink()
    assert safe.read_text() == "as it was\n"


@pytest.mark.parametrize("kind", ["device", "pipe", "hole"])
def test_rows_in_no_file_of_lines_end_in_a_sentence(two_launches, forescale, kind):
    for name in ("metrics.jsonl", "events.jsonl"):
        file = two_launches.attempts()[-1].path / name
        before = file.read_bytes()
        file.unlink()
        if kind == "device":
            file.symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(file)
        else:
            file.touch()
            os.truncate(file, 1 << 30)
        for words in (("status", "small"), ("report", "small", "output=page.html")):
            code, _, err = forescale(*words)
            assert (code, str(file) in err) == (2, True)
        file.unlink()
        file.write_bytes(before)
