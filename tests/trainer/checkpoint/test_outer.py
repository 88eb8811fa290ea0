"""The store of a run on several clusters: who enters it, who counts, and what is read from it."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from forescale.checkpoint.outer import OuterStore, shapes_hash
from forescale.config.duration import Duration
from forescale.config.sections.outer import OuterConfig
from forescale.ground.errors import UserError
from forescale.ground.storage import hash_file, write_file, write_table
from forescale.remote.buckets import Folder

NAMES = ["east", "north", "south"]
CONFIG = OuterConfig(Duration(3), members=NAMES, wait=Duration(0.3, "seconds"))


def store(folder: Path, member: str = "north", run: str | None = None, **keys) -> OuterStore:
    config = replace(CONFIG, **{"store": str(folder / "store"), "member": member, **keys})
    (folder / member).mkdir(exist_ok=True)
    return OuterStore(config, run or member, folder / member)


def sent(
    one: OuterStore, step: int = 3, data: bytes = b"x", attempt: int = 1, finite: bool = True
) -> Path:
    """Write the files of a member as a checkpoint has them, and send them."""
    folder = f"{one.member}.{attempt:04d}"
    path = one.local / f"step-{step:08d}" / folder
    path.mkdir(parents=True, exist_ok=True)
    write_file(path / "rank-00000.safetensors", data)
    write_file(path / "state.json", b"{}")
    names = ("rank-00000.safetensors", "state.json")
    write_table(path, {name: hash_file(path / name) for name in names})
    for name in names:
        one.put(step, folder, path / name)
    one.publish(step, folder, path, base="0", finite=finite)
    return path


def decided(one: OuterStore, step: int = 3, previous: int | None = None):
    decision = one.decide(step, previous, lambda: False)
    assert decision is not None
    return decision


def sentence(raised) -> str:
    return str(raised.value)


def test_members_with_other_keys_or_another_model_are_refused(tmp_path):
    facts = {"every": 3, "model": shapes_hash({"a": (2, 3)})}
    store(tmp_path).join(facts)
    store(tmp_path).join(facts)
    store(tmp_path, "south").join(facts)
    for other in ({"every": 4}, {"model": shapes_hash({"a": (3, 2)})}):
        with pytest.raises(UserError) as raised:
            store(tmp_path, "east").join(facts | other)
        assert next(iter(other)) in sentence(raised)
        assert "another outer.store" in sentence(raised)


def test_a_name_belongs_to_one_run(tmp_path):
    store(tmp_path).join({})
    with pytest.raises(UserError, match="another run is the member north already"):
        store(tmp_path, run="an imposter").join({})


def test_a_store_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(UserError, match="store"):
        store(tmp_path).join({})


def test_those_who_sent_all_of_their_files_count_after_the_wait(tmp_path):
    north, south, east = (store(tmp_path, name) for name in ("north", "south", "east"))
    sent(north)
    sent(south)
    path = tmp_path / "half"
    path.mkdir()
    write_file(path / "rank-00000.safetensors", b"half of it")
    east.put(3, "east.0001", path / "rank-00000.safetensors")
    began = time.monotonic()
    decision = decided(north)
    assert time.monotonic() - began >= 0.3
    assert [*decision.members] == ["north", "south"]
    sent(east, attempt=2)
    assert decided(east) == decided(south) == decision  # whoever comes later


def test_all_members_that_decide_at_once_get_one_decision(tmp_path):
    stores = [store(tmp_path, name) for name in NAMES]
    for one in stores:
        sent(one)
    decisions = []
    threads = [
        threading.Thread(target=lambda one=one: decisions.append(decided(one))) for one in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert decisions == [decisions[0]] * 3
    assert [*decisions[0].members] == NAMES


def test_who_was_left_out_is_awaited_again_once_it_announces_itself(tmp_path):
    long = {"wait": Duration(60, "seconds")}
    north, south = store(tmp_path), store(tmp_path, "south", **long)
    sent(north)
    assert [*decided(north).members] == ["north"]
    north = store(tmp_path, **long)
    sent(north, 6)
    assert [*decided(north, 6, 3).members] == ["north"]  # at once
    south.announce(9)
    sent(north, 9)
    thread = threading.Thread(target=lambda: (time.sleep(0.5), sent(south, 9)))
    thread.start()
    assert [*decided(north, 9, 6).members] == ["north", "south"]
    thread.join()


def test_who_sent_nan_is_refused_at_once_and_awaited_in_the_next_round(tmp_path):
    long = {"wait": Duration(60, "seconds")}
    east, north, south = (store(tmp_path, name, **long) for name in NAMES)
    for one in (north, south, east):
        sent(one, finite=one is not south)
    decision = decided(north)
    assert ([*decision.members], decision.refused) == (["east", "north"], ["south"])
    sent(north, 6)
    sent(east, 6)
    thread = threading.Thread(target=lambda: (time.sleep(0.5), sent(south, 6)))
    thread.start()
    assert [*decided(north, 6, 3).members] == NAMES
    thread.join()


def test_a_member_that_is_to_stop_decides_nothing(tmp_path):
    sent(north := store(tmp_path))
    assert north.decide(3, None, lambda: True) is None
    assert north.decision(3) is None


def test_files_that_differ_from_their_table_are_refused(tmp_path):
    north, south = store(tmp_path), store(tmp_path, "south")
    sent(south, data=b"abc")
    record = south.record(3)
    copy = tmp_path / "store/step-00000003/south.0001"
    north.fetch_table(3, record)
    assert north.fetch(3, record, (0, 1)) == 3
    assert north.fetch(3, record, (0, 1)) == 0  # it is here
    (north.path_of(3, record) / "rank-00000.safetensors").unlink()
    (copy / "rank-00000.safetensors").write_bytes(b"abd")
    with pytest.raises(UserError, match=r"south.0001/rank-00000.safetensors: was changed"):
        north.fetch(3, record, (0, 1))
    (copy / "files.json").write_text("{}")
    (north.path_of(3, record) / "files.json").unlink()
    with pytest.raises(UserError, match=r"south.0001/files.json: was changed"):
        north.fetch_table(3, record)
    (copy / "files.json").unlink()
    with pytest.raises(UserError, match=r"files.json: doesn't exist any more; restore the file"):
        north.fetch_table(3, record)


def test_what_a_member_sent_first_counts(tmp_path):
    north = store(tmp_path)
    sent(north)
    first = north.record(3)
    sent(north, data=b"other", attempt=2)
    assert north.record(3) == first


def test_files_that_no_member_needs_are_deleted_and_decisions_stay(tmp_path):
    stores = [store(tmp_path, name) for name in NAMES]
    for step in (3, 6):
        for one in stores:
            sent(one, step)
        decided(stores[0], step)
    folders = lambda: sorted(p.parent.name for p in tmp_path.glob("store/*/north.0001"))  # noqa: E731
    of_others = [tmp_path / "store" / name for name in ("a/b/c", "step-00000003/new.0001x/c")]
    for path in of_others:
        path.parent.mkdir(parents=True)
        path.touch()
    for one in stores:
        assert folders() == ["step-00000003", "step-00000006"]
        one.prune(6)
    assert folders() == ["step-00000006"]
    assert all(path.exists() for path in of_others)
    assert stores[0].decision(3) is not None


def test_a_damaged_decision_is_one_sentence(tmp_path):
    north = store(tmp_path)
    path = tmp_path / "store/step-00000003/decision.json"
    path.parent.mkdir(parents=True)
    record = {"folder": "north.0001", "table": "0", "base": "0", "bytes": 1}
    members = [3, {}, {"west": record}]
    members += [{"north": record | {"folder": f}} for f in ("../../x", "/x", "..", "north", 3)]
    texts = [json.dumps({"members": each, "decided_by": "north"}) for each in members]
    for text in ("{", "[]", *texts):
        path.write_text(text)
        with pytest.raises(UserError, match=r"decision.json"):
            north.decision(3)


def test_damaged_notes_of_members_are_one_sentence(tmp_path):
    north = store(tmp_path)
    north.join({})
    for name, use in (("run", north.join), ("members/north", north.join)):
        path = tmp_path / f"store/{name}.json"
        whole = path.read_text()
        path.write_text("[1]")
        with pytest.raises(UserError, match=rf"{name}.json: is damaged"):
            use({})
        path.write_text(whole)
    for text in ("[1]", '{"step": NaN}', '{"step": "3"}'):
        (tmp_path / "store/members/south-needs.json").write_text(text)
        with pytest.raises(UserError, match=r"south-needs.json: is damaged"):
            north.prune(3)


def test_a_store_that_replaces_what_is_to_be_created_once_is_refused(tmp_path, monkeypatch):
    """As a server of S3 does that doesn't know conditional writes."""
    monkeypatch.setattr(Folder, "create", lambda *_: True)
    with pytest.raises(UserError, match="conditional writes"):
        store(tmp_path).join({})
