"""Values of a wrong type in the metadata of a run whose checksums agree with them, as a stranger or
a faulty writer can make them: every verb that reads them ends with code 0 or 2, with one sentence
and no traceback, and a list of runs still shows the others.

All verbs run in this process. The fast test takes a few values of each file, the slow one hundreds.
"""

import copy
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forescale.checkpoint.reader import newest_complete
from forescale.ground.errors import UserError
from forescale.ground.storage import (
    FileEntry,
    read_json,
    read_table,
    write_checked_json,
    write_json,
    write_table,
)
from forescale.resilience.diagnosis import Hang, publish_hang
from forescale.resilience.heartbeat import Heartbeat, RankStatus, write_node
from forescale.run.directory import Run
from forescale.run.history import Saved, expect_whole, history_of
from forescale.run.rows import RowWriter, read_rows
from forescale.run.start import start
from tests.attack import test_small_files
from tests.attack.test_small_files import HEAVY, LIGHT
from tests.questions import rows, write_rows
from tests.trainer.small_run import make_job

exportable, two_launches = test_small_files.exportable, test_small_files.run
DEEP: list = []
for _ in range(300):
    DEEP = [DEEP]
WRONG = (None, True, "x", "", [], {}, [None], {"x": 1}, -1, 1.5, 1e400, 10**30, 2**62, DEEP)
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
        self.content = self.content or read_json(path)
        table = path.with_name("files.json")
        self.before = {p: p.read_bytes() for p in (path, table) if p.exists()}

    def restore(self) -> None:
        for path, raw in self.before.items():
            path.write_bytes(raw)

    def write(self, value: Any) -> None:
        if self.path.name == "state.json":
            table = read_table(self.path.parent)
            table["state.json"] = write_json(self.path, value)
            write_table(self.path.parent, table)
        elif self.rows:
            self.write_rows(value if isinstance(value, dict) else {})
        elif isinstance(value, dict):
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
    if words == ("status",) and (code or "other" not in out):
        yield f"hides the other run: {out} {err}"


def attack(forescale, run: Run, file: str, number: int, verbs: int) -> None:
    """Meet `number` changes of a file, each with some verbs in turn, and resumption."""
    signed, faults = Signed(run.path / file), []
    data = read_json(run.identity)["dataset"]["path"]
    every = mutations(signed.content)
    for n, (path, wrong) in enumerate(random.Random(file).sample(every, min(number, len(every)))):
        signed.write(changed(signed.content, path, *wrong))
        where = f"{file}: {'.'.join(map(str, path))} = {repr(wrong)[1:30]}"
        for i in range(verbs):
            words = VERBS[(n + 3 * i) % len(VERBS)]
            faults += [f"{where}: {words[0]} {fault}" for fault in faults_of(forescale, words)]
        try:
            resume(run, data)
        except Exception as e:
            faults.append(f"{where}: train raised {type(e).__name__}: {e}")
        signed.restore()
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("file", [FILES[0], FILES[-2]])
def test_a_few_wrong_values_with_right_checksums(attacked, forescale, file):
    attack(forescale, attacked, file, 6, 1)


@pytest.mark.slow  # some thousand commands
@pytest.mark.parametrize("file", FILES)
def test_wrong_values_with_right_checksums_end_in_a_sentence_in_every_verb(
    attacked, forescale, file
):
    attack(forescale, attacked, file, 40, 4)
