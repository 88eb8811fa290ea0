"""`forescale check`: every fault that is put in is named, and nothing else."""

import shutil

import pytest

from forescale import open_run
from forescale.checkpoint.reader import Position, coverage_faults
from forescale.config.frozen import freeze, thaw
from forescale.config.train import TrainJob
from forescale.engine.portable.strips import Series
from forescale.ground.storage import read_json, read_table, write_file, write_json, write_table
from forescale.monitor.audit import replay_faults, row_faults
from forescale.resilience.outcome import record_start
from forescale.run.directory import Parent
from forescale.run.rows import read_rows
from tests.trainer.small_run import change_rows, feed, make_job, make_run, save, train_row


def rewrite_rows(run, change):
    """Put the newest attempt's rows through `change`."""
    change_rows(run.metrics, change)


def rewrite_state(checkpoint, change):
    """Change state.json as a faulty writer would: the table agrees with it."""
    state = read_json(checkpoint / "state.json")
    change(state)
    table = read_table(checkpoint)
    table["state.json"] = write_json(checkpoint / "state.json", state)
    write_table(checkpoint, table)


def test_a_whole_run_a_checkpoint_and_a_dataset(trained, forescale, small_data):
    code, out, err = forescale("check", trained.path)
    assert code == 0
    assert "Fault" not in err
    assert "8 train rows, steps 1 to 8" in out
    out = forescale.prints("check", trained.checkpoint_path(4))
    size = sum(p.stat().st_size for p in trained.checkpoint_path(4).iterdir())
    table = (trained.checkpoint_path(4) / "files.json").stat().st_size
    assert f"({size - table:,} bytes read" in out
    assert "validation: " in forescale.prints("check", small_data)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "state.json", "files.json"])
@pytest.mark.parametrize("harm", [flip, drop, cut])
def test_harm_to_a_checkpoint_is_named(own_run, forescale, name, harm):
    harm(own_run.checkpoint_path(8) / name)
    for target in (own_run.checkpoint_path(8), "small"):
        err = forescale.refuses("check", target)
        assert f"step-00000008/{name}" in err or (name == "files.json" and "step-00000008" in err)
        assert "step-00000004" not in err


@pytest.mark.parametrize("harm", [flip, drop, cut])
@pytest.mark.parametrize("name", ["train-000000.tar", "manifest.json", "tokenizer.json"])
def test_harm_to_a_dataset_is_named(small_data, tmp_path, forescale, harm, name):
    copy = shutil.copytree(small_data, tmp_path / "copy")
    harm(copy / name)
    code, out, err = forescale("check", copy)
    assert code == 2
    assert f"copy/{name}" in err
    assert "complete" not in out


def gap(fragments):
    fragments["rank-00001.safetensors"][0][2] += 1


def overlap(fragments):
    fragments["rank-00001.safetensors"][0][2] -= 1


def missing(fragments):
    del fragments["rank-00001.safetensors"][0]


def unknown(fragments):
    fragments["rank-00001.safetensors"].append(["stranger", "weight", 0, 1])


def twice(fragments):
    fragments["rank-00001.safetensors"].append(fragments["rank-00001.safetensors"][0])


@pytest.mark.parametrize("harm", [gap, overlap, missing, unknown, twice])
def test_fragments_that_do_not_cover_are_named(own_run, forescale, harm):
    checkpoint = own_run.checkpoint_path(8)
    rewrite_state(checkpoint, lambda state: harm(state["fragments"]))
    err = forescale.refuses("check", checkpoint)
    assert err.count("Fault: ") == 1
    assert "weight of" in err


def test_a_moment_may_be_absent_but_not_in_part():
    parts = [Series("a", "weight", 4, 2), Series("a", "weight", 0, 4, rank=1)]  # in any order
    assert coverage_faults({"a": [2, 3]}, parts) == []
    parts.append(Series("a", "exp_avg", 0, 5))
    assert coverage_faults({"a": [2, 3]}, parts) == ["exp_avg of a: 5 of 6 elements"]
    assert coverage_faults({"a": [1]}, []) == ["weight of a: no fragment"]


ROWS = {
    "a gap": (lambda rows: rows[:2] + rows[3:], "step 4 follows step 2"),
    "a double": (lambda rows: rows[:3] + rows[2:], "step 3 follows step 3"),
    "a lost head": (lambda rows: rows[1:], "step 2 follows step 0"),
    "samples": (lambda rows: [*rows[:3], rows[3] | {"g0": 13, "g1": 17}, *rows[4:]], "sample 13"),
    "tokens": (lambda rows: [*rows[:3], rows[3] | {"tokens": 7}, *rows[4:]], "but counts 7 in"),
    "a batch": (
        lambda rows: [*rows[:7], rows[7] | {"g1": 30}],
        "ends at sample 30; its batch of 4 windows makes it 32",
    ),
    "a lost tail": (lambda rows: rows[:7], "no row for step 8"),
    "another step": (lambda rows: [*rows[:7], rows[7] | {"tokens": 1020}], "checkpoint at step 8"),
    "a lame row": (lambda rows: [{"kind": "train"}, *rows[1:]], "has no step"),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_hash": 7}, "step 3 was trained on other tokens than the shards hold now"),
        ({"shares": {"data": 127}, "tokens": 0}, "step 3 has {'data': 127} targets in its row"),
    ],
)
def test_rows_are_compared_with_the_shards(own_run, change, message):
    """What the other checks can't see: the tokens themselves."""
    rows = read_rows(own_run.metrics, kind="train")
    data = feed(own_run.path)
    assert list(replay_faults(rows, data)) == []
    rows[2] |= change
    (fault,) = replay_faults(rows, data)
    assert message in fault


def test_changed_shards_are_found_and_missing_ones_noted(own_run, forescale, small_data, tmp_path):
    identity = read_json(own_run.identity)
    copy = shutil.copytree(small_data, tmp_path / "copy")
    identity["dataset"]["sources"]["data"]["path"] = str(copy)
    write_json(own_run.identity, identity)
    assert "each step's tokens are those in the shards" in forescale.prints("check", "small")
    flip(copy / "train-000000.tar")
    assert "train-000000.tar" in forescale.refuses("check", "small")
    shutil.rmtree(copy)
    assert "the tokens were not compared" in forescale.prints("check", "small")


def test_skipped_samples_are_no_gap(own_run):
    job = thaw(TrainJob, own_run.config, True)
    rows = read_rows(own_run.metrics, kind="train")
    by = [5 * (row["step"] > 3) for row in rows]
    moved = [
        row | {"g0": row["g0"] + n, "g1": row["g1"] + n} for row, n in zip(rows, by, strict=True)
    ]
    assert list(row_faults(moved, Position(), job, [(12, 17)])) == []
    assert "step 4 begins at sample 17, not 12" in list(row_faults(moved, Position(), job))
    inside = [rows[0] | {"g1": 6}, *[r | {"g0": r["g0"] + 2, "g1": r["g1"] + 2} for r in rows[1:]]]
    assert list(row_faults(inside, Position(), job, [(1, 3)])) == []
    assert list(row_faults(rows, Position(), job, [(1, 3)])) != []


@pytest.mark.parametrize("name", ROWS)
def test_rows_with_gaps_are_reported(own_run, forescale, name):
    harm, message = ROWS[name]
    rewrite_rows(own_run, harm)
    assert message in forescale.refuses("check", "small")


def test_a_line_that_is_no_json_is_named_but_a_torn_last_one_is_not(own_run, forescale):
    path = own_run.metrics
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "tr')
    assert forescale("check", "small")[0] == 0
    path.write_bytes(b"x" + whole)
    assert "metrics.jsonl, line 1: the row is damaged" in forescale.refuses("check", "small")


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_a_config_that_cannot_be_read_is_named(own_run, forescale, name):
    (own_run.path / name).write_text("{]")
    assert name in forescale.refuses("check", "small")
    own_run.tokenizer.unlink()
    assert "tokenizer.json: missing" in forescale("check", "small")[2]


SMALL = ("config.yaml", "run.json", "tokenizer.json")
OF_ATTEMPTS = ("parent.json", "launch.json", "metrics.jsonl", "events.jsonl")


@pytest.fixture
def launched(own_run):
    """A run that a launcher of ours has started."""
    record_start(own_run.attempts()[0].path, ["train"], 2)
    return own_run


@pytest.mark.parametrize("name", [*SMALL, *(f"attempts/0001/{name}" for name in OF_ATTEMPTS)])
def test_a_flipped_byte_of_any_small_file_is_named(launched, forescale, name):
    assert forescale("check", "small")[0] == 0
    path = launched.path / name
    whole = path.read_bytes()
    for place in (len(whole) // 3, 2 * len(whole) // 3, len(whole) - 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        code, _, err = forescale("check", "small")
        assert (code, name in err, "Traceback" in err) == (2, True, False), place
    path.write_bytes(whole)
    assert forescale("check", "small")[0] == 0


def test_another_rope_theta_is_not_whole_and_scores_nothing(own_run, forescale):
    text = own_run.config.read_text()
    own_run.config.write_text(text.replace("theta: 10000", "theta: 20000"))
    assert own_run.config.read_text() != text
    for verb in ("check", "eval", "status", "generate"):
        code, _, err = forescale(verb, "small")
        assert (code, "checksum differs" in err) == (2, True), verb


def test_rows_that_are_gone_since_a_checkpoint_are_named(own_run, forescale):
    """An event without which the rest is whole; then the whole attempt."""
    events = own_run.attempts()[0].events.path
    first, *rest = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(b"".join(rest))
    assert "0001/events.jsonl: its first" in forescale.refuses("check", "small")
    events.write_bytes(first + b"".join(rest))
    assert forescale("check", "small")[0] == 0
    for _ in range(2):
        attempt = own_run.new_attempt()
        attempt.start_from(Parent(8, str(own_run.checkpoint_path(8))), own_run)
    shutil.rmtree(own_run.path / "attempts/0002")
    code, _, err = forescale("check", "small")
    assert (code, "attempts/0002: missing" in err) == (2, True)


def test_a_copy_of_a_checkpoint_beside_it_harms_no_verb(own_run, forescale):
    shutil.copytree(own_run.checkpoint_path(8), own_run.checkpoints / "step-00000008.bak")
    shutil.copytree(own_run.path / "attempts/0001", own_run.path / "attempts/0001.bak")
    assert "step-00000008.bak: not the name of a checkpoint" in forescale.prints("check", "small")
    for words in (["status", "small"], ["status"], ["prune", "small"], ["eval", "small"]):
        assert forescale(*words)[0] == 0
    assert forescale("pin", "small", "step=8")[0] == 0


def test_checkpoints_of_an_abandoned_branch_are_noted(own_run, forescale):
    attempt = own_run.new_attempt()
    attempt.start_from(Parent(4, str(own_run.checkpoint_path(4))), own_run)
    assert "step-00000008: not eligible" in forescale.prints("check", "small")


def test_leftovers_of_a_killed_save_are_noted(own_run, forescale):
    (own_run.checkpoints / ".step-00000009.attempt-0001.stage").mkdir()
    assert "interrupted save" in forescale.prints("check", "small")


def test_a_branch_begins_where_its_origin_was(own_run, forescale, small_data):
    """Steps and samples go on from the origin's; from weights only they begin anew."""
    branch = make_run(small_data, own_run.path.parent, "branch")
    job = make_job(small_data, own_run.path.parent, "branch", "run.from.run=small")
    write_file(branch.config, freeze(job).encode())
    parent = {"step": 4, "checkpoint": str(own_run.checkpoint_path(4))}
    write_json(branch.attempts()[0].path / "parent.json", parent)
    assert "step 1 follows step 4" in forescale.refuses("check", "branch")
    rewrite_rows(branch, lambda rows: rows[4:])
    for step in (4, 8):  # written anew, as if the rows had been so
        rewrite_state(branch.checkpoint_path(step), lambda state: state.pop("logged"))
    assert forescale("check", "branch")[0] == 2  # its checkpoint at step 4 has no row
    shutil.rmtree(branch.checkpoint_path(4))
    assert forescale("check", "branch")[0] == 0
    shutil.rmtree(own_run.path)  # the origin may be gone
    assert forescale("check", "branch")[0] == 0


def test_a_path_without_anything_is_refused(own_run, forescale, tmp_path):
    for target in (tmp_path, "nothing"):
        assert "no run has this name or path" in forescale.refuses("check", target)


def test_a_checkpoint_with_another_name_than_its_step(own_run, forescale):
    shutil.move(own_run.checkpoint_path(8), own_run.checkpoint_path(9))
    assert "step-00000009: holds step 8" in forescale.refuses("check", "small")


def test_a_resumed_run_is_whole(own_run, forescale):
    """The history of the first attempt, then the second's own rows and checkpoint."""
    attempt = own_run.new_attempt()
    attempt.start_from(Parent(4, str(own_run.checkpoint_path(4))), own_run)
    for step in range(5, 7):
        attempt.metrics.add(train_row(attempt, step))
    shutil.rmtree(own_run.checkpoint_path(8))
    save(own_run, attempt, 6, open_run(own_run.path).model(4))
    assert "6 train rows" in forescale.prints("check", "small")
