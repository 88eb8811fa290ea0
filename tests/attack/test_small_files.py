"""Flipped bytes in the small files of a run: every verb that reads it ends with code 0 or 2, with
one sentence and no traceback; and a score or text that is still made is the one from before.

All verbs run in this process. The slow test takes bytes at many places; the fast one a few.
"""

import random
import shutil

import pytest

from forescale.ground.storage import FileEntry, read_json
from forescale.resilience.outcome import record_end, record_start
from forescale.run.directory import Parent, Run
from forescale.run.history import Saved, expect_whole, history_of
from tests.trainer.small_run import make_run, train_row

LIGHT = (
    ("status", "small"),
    ("status",),
    ("report", "small", "output=page.html"),
    ("check", "small"),
    ("logs", "small", "follow=false"),
    ("prune", "small"),
    ("stop", "small"),
    ("pin", "small", "step=8"),
)
HEAVY = (
    ("eval", "small", "windows=2"),
    ("generate", "small", "num_tokens=2"),
    ("export", "small", "to=exported"),
)
SAME = HEAVY[:2]
FILES = (
    "config.yaml",
    "run.json",
    "tokenizer.json",
    *(f"attempts/{n}/{name}.jsonl" for n in ("0001", "0002") for name in ("metrics", "events")),
    *(f"attempts/{n}/{name}.json" for n in ("0001", "0002") for name in ("parent", "launch")),
)


@pytest.fixture(scope="module")
def exportable(small_data, tmp_path_factory) -> Run:
    sizes = ("model.num_layers=2", "model.width=32", "model.num_heads=2")
    return make_run(small_data, tmp_path_factory.mktemp("exportable"), "small", *sizes)


@pytest.fixture
def run(exportable, tmp_path, monkeypatch) -> Run:
    """A run of two launches under runs/small: the second went on from step 4."""
    monkeypatch.chdir(tmp_path)
    own_run = Run(shutil.copytree(exportable.path, "runs/small", symlinks=True))
    first = own_run.attempts()[0]
    record_start(first.path, ["train"], 2)
    record_end(first.path, 1, "rank 0 ended with SIGKILL")
    (first.path / "rank-0.log").write_text("a line\n")
    second = own_run.new_attempt()
    record_start(second.path, ["train"], 2)
    second.start_from(Parent(4, str(own_run.checkpoint_path(4))), own_run)
    for step in (5, 6):
        second.metrics.add(train_row(second, step))
    second.event("ended", step=6, reason="interrupted", seconds={"closing": 0.1})
    record_end(second.path, 75, "interrupted")
    return own_run


def resume(run: Run) -> None:
    """What an attempt reads when it starts, without an engine."""
    shutil.copytree(run.path, "resumed", symlinks=True, dirs_exist_ok=True)
    again = Run("resumed")
    state = read_json(again.checkpoint_path(4) / "state.json")
    saved = Saved(4, state["attempt"], FileEntry(**state["logged"]["metrics.jsonl"]))
    expect_whole(again, attempt := again.new_attempt(), saved)
    again.skipped(), again.rollbacks()
    attempt.start_from(Parent(4), again, history_of(again, saved))
    shutil.rmtree("resumed")


def flipped(path, places: int, seed: int):
    """Yield the file with one bit flipped, at `places` random places."""
    whole, dice = path.read_bytes(), random.Random(f"{path.name}{seed}")
    for place in sorted(dice.sample(range(len(whole)), min(places, len(whole)))):
        harmed = bytearray(whole)
        harmed[place] ^= 1 << dice.randrange(8)
        yield place, bytes(harmed)


def attack(run, forescale, file, places, verbs, seed=0):
    path = run.path / file
    whole, before = path.read_bytes(), {}
    for words in {words for n in range(10) for words in verbs(n)}:
        shutil.rmtree("exported", ignore_errors=True)
        code, before[words], err = forescale(*words)
        assert code == (2 if words[0] == "stop" else 0), (words, err)  # nothing runs
    for n, (place, harmed) in enumerate(flipped(path, places, seed)):
        path.write_bytes(harmed)
        for words in verbs(n):
            shutil.rmtree("exported", ignore_errors=True)
            code, out, err = forescale(*words)
            assert code in (0, 2), (file, place, words, code, err)
            assert "Traceback" not in err, (file, place, words)
            if code == 0 and words in SAME:
                assert out == before[words], (file, place, words)
            if code == 2 and words[0] != "check":
                messages = [line for line in err.splitlines() if line.startswith("forescale: ")]
                assert len(messages) == 1, (file, place, words, err)
    path.write_bytes(whole)


@pytest.mark.parametrize("file", ["config.yaml", "attempts/0002/metrics.jsonl"])
def test_a_few_flipped_bytes(run, forescale, file):
    attack(run, forescale, file, 6, lambda n: LIGHT[:5])


@pytest.mark.slow  # some hundred flipped bytes, each met by several verbs
@pytest.mark.parametrize("file", FILES)
def test_flipped_bytes_end_in_a_sentence_in_every_verb(run, forescale, file):
    every = (*LIGHT, *HEAVY)
    attack(run, forescale, file, 16, lambda n: [every[(n + i) % len(every)] for i in (0, 3, 5, 7)])


@pytest.mark.slow  # some hundred flipped bytes
@pytest.mark.parametrize("file", FILES)
def test_a_run_with_a_flipped_byte_resumes_with_the_same_rows_or_says_why(run, file):
    from forescale.ground.errors import UserError

    path = run.path / file
    whole = path.read_bytes()
    refused = 0
    for _, harmed in flipped(path, 16, 1):
        path.write_bytes(harmed)
        try:
            resume(run)
        except UserError:
            refused += 1
            shutil.rmtree("resumed")
    path.write_bytes(whole)
    resume(run)
    assert refused == 0 or "parent" in file or "events" in file, "another attempt has the rows"
