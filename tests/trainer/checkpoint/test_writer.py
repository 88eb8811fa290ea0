"""Loading a checkpoint: any harm is found, the next older one is taken, and no code runs."""

import errno
import json
import os
import pickle
import shutil
import struct
import threading

import pytest
import torch
import yaml

import forescale
from forescale.checkpoint import choice, writer
from forescale.checkpoint.choice import newest_complete
from forescale.checkpoint.reader import Checkpoint
from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.engine.ranks import Ranks
from forescale.ground import errors, storage
from forescale.ground.errors import UserError
from forescale.ground.storage import (
    TABLE,
    check_table,
    read_json,
    read_table,
    write_json,
    write_table,
)
from forescale.run.directory import Run
from tests.trainer import plain_engine as plain


def save(run, attempt, step, engine=None):
    engine = engine or plain.engine(width=2)
    plain.set_step(engine, step)
    return plain.write_checkpoint(run, attempt.number, plain.position(step), engine)


@pytest.fixture
def run(tmp_path):
    """Two checkpoints of one attempt, at 10 and 20."""
    run = Run(tmp_path / "run")
    attempt = plain.begin(run)
    for step in (10, 20):
        save(run, attempt, step)
    return run


class Reports(list):
    def __call__(self, kind, **facts):
        self.append((kind, facts["step"]))


def chosen(run, **options):
    """(the step that is loaded, what was said on the way)"""
    reports = Reports()
    checkpoint = newest_complete(run, reports, **options)
    return checkpoint and plain.step_in(checkpoint), reports


def files(run, step=20):
    return sorted(run.checkpoint_path(step).iterdir())


SAMPLED = [13, pytest.param(1, marks=pytest.mark.slow)]  # each byte takes a read of all files


@pytest.mark.parametrize("every", SAMPLED)
def test_every_flipped_byte_of_every_file_is_caught(run, every):
    """One bit of every byte, or of one byte in so many."""
    flipped = 0
    assert [p.name for p in files(run)] == ["files.json", "rank-00000.safetensors", "state.json"]
    for path in files(run):
        whole = bytearray(path.read_bytes())
        for at in range(0, len(whole), every):
            whole[at] ^= 1 << at % 8
            path.write_bytes(whole)
            assert chosen(run) == (10, [("checkpoint_damaged", 20)]), (path.name, at)
            whole[at] ^= 1 << at % 8
            flipped += 1
        path.write_bytes(whole)
    assert chosen(run) == (20, [])
    print(f"{flipped:,} flips caught")
    assert flipped > 2000 / every


@pytest.mark.parametrize("every", SAMPLED)
def test_every_truncation_of_every_file_is_caught(run, every):
    for path in files(run):
        whole = path.read_bytes()
        for size in {*range(0, len(whole), every), len(whole) - 1}:
            path.write_bytes(whole[:size])
            # All of a table but its last newline still says everything.
            expected = (20, []) if path.name == TABLE and size == len(whole) - 1 else None
            assert chosen(run) == (expected or (10, [("checkpoint_damaged", 20)])), path.name
        path.unlink()
        assert chosen(run) == (10, [("checkpoint_damaged", 20)])
        path.write_bytes(whole)
        path.write_bytes(whole + b"\0")
        assert chosen(run)[0] == 10
        path.write_bytes(whole)


def test_without_a_whole_one_it_never_starts_anew(run):
    plain.harm(run, 10)
    plain.harm(run, 20)
    with pytest.raises(UserError, match=r"none of its 2 .* can be used; .*forescale check"):
        newest_complete(run, Reports())
    shutil.rmtree(run.checkpoints)
    assert newest_complete(run, Reports()) is None


def test_storage_that_gives_an_error_in_place_of_bytes_is_a_damage(run, monkeypatch):
    """A bad sector: the older one is taken, and no traceback is seen."""
    real = storage.open_regular

    def failing(path, *args, **options):
        if "step-00000020/rank" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(storage, "open_regular", failing)
    monkeypatch.setattr(errors, "PAUSES", (0.0,))
    assert chosen(run) == (10, [("checkpoint_damaged", 20)])
    (fault,) = check_table(run.checkpoint_path(20))
    assert "rank-00000.safetensors: the storage reports an I/O error (tried 2 times)" in fault


def test_a_checkpoint_under_another_name_is_a_damage(run):
    run.checkpoint_path(20).rename(run.checkpoint_path(30))
    assert chosen(run) == (10, [("checkpoint_damaged", 30)])


def test_what_does_not_count_is_passed_over_without_being_read(run, monkeypatch):
    plain.begin(run, 10)
    paths = []
    whole = choice.find_faults
    monkeypatch.setattr(
        choice, "find_faults", lambda path, *options: paths.append(path) or whole(path, *options)
    )
    assert chosen(run) == (10, [("checkpoint_passed_over", 20)])
    assert paths == [run.checkpoint_path(10)]


def test_going_back_takes_the_newest_that_is_early_enough(run):
    save(run, run.attempts()[0], 30)

    def back(newest, strictly=False):
        return choice.newest_before(run, newest, strictly, Reports()).position.step

    assert [back(n) for n in (30, 29, 10, 9)] == [30, 20, 10, 10]
    with pytest.raises(UserError, match="no complete checkpoint of step 9 or before"):
        back(9, strictly=True)
    plain.harm(run, 20)
    assert back(29) == 10


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_share_the_reading_and_all_hear_of_a_fault_that_one_has_found(
    tmp_path, monkeypatch, size
):
    run, worlds = Run(tmp_path / "run"), plain.worlds(size)
    attempt = plain.begin(run)
    engines = [plain.engine(world, width=4) for world in worlds]
    for step in (10, 20):
        plain.on_all(worlds, lambda w, step=step: save(run, attempt, step, engines[w.rank]))
    read, lock, real = [], threading.Lock(), storage.hash_file

    def noted(path, *options):
        with lock:
            read.append((path.parent.name[-2:], path.name))
        return real(path, *options)

    monkeypatch.setattr(storage, "hash_file", noted)

    def load(world):
        return chosen(run, ranks=world)

    assert plain.on_all(worlds, load) == [(20, [])] * size
    # state.json twice: first, before it is believed, and as one of the shares
    assert len(read) == size + 2
    assert {name for _, name in read} == set(read_table(run.checkpoint_path(20)))
    file = run.checkpoint_path(20) / f"rank-{size - 1:05d}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert plain.on_all(worlds, load) == [(10, [("checkpoint_damaged", 20)])] * size
    shutil.rmtree(run.checkpoint_path(10))
    messages = plain.on_all(worlds, load)
    assert {str(e) for e in messages} == {str(messages[0])}
    assert "none of its 1 checkpoints can be used" in str(messages[0])


def test_ranks_hand_nothing_on_that_grows_with_ranks(tmp_path):
    """What a checkpoint says of itself is read by each rank, or made by rank 0 alone."""
    run, worlds = Run(tmp_path / "run"), plain.worlds(2)
    attempt = plain.begin(run)
    engines = [plain.engine(world, width=4) for world in worlds]
    heard = []

    class Listening(Ranks):
        def __init__(self, world):
            super().__init__(world.rank, world.size)
            self.world = world

        def gather(self, value):
            heard.append(len(json.dumps(value)))
            return self.world.gather(value)

        def gather_to_main(self, value):
            return self.world.gather_to_main(value)

    def go(world):
        engine = engines[world.rank]
        plain.set_step(engine, 10)
        snapshot = writer.Snapshot.of(engine, plain.position(10), {})
        writer.write(run, attempt.number, snapshot, Listening(world))
        return chosen(run, ranks=Listening(world))

    assert plain.on_all(worlds, go) == [(10, [])] * 2
    assert max(heard) < 300, "a size, a fault, a few steps"


def test_what_was_saved_is_loaded_whatever_the_number_of_ranks(tmp_path):
    for size in (1, 2, 3):
        run, worlds = Run(tmp_path / str(size)), plain.worlds(size)
        engines = [plain.engine(world, width=5) for world in worlds]
        attempt = plain.begin(run)
        plain.on_all(worlds, lambda w: save(run, attempt, 10, engines[w.rank]))  # noqa: B023
        other = plain.engine(width=5)
        writer.load(Checkpoint(run.checkpoint_path(10)), other)
        again = Run(tmp_path / f"{size}-again")
        plain.write_checkpoint(again, 1, plain.position(10), other)
        assert plain.step_in(Checkpoint(again.checkpoint_path(10))) == 10


def test_a_checkpoint_of_the_format_before_loads_on_any_number_of_ranks(tmp_path):
    """It has a row of each fragment, by file."""
    run, worlds = Run(tmp_path / "old"), plain.worlds(3)
    engines, attempt = [plain.engine(world, width=5) for world in worlds], plain.begin(run)
    plain.on_all(worlds, lambda w: save(run, attempt, 10, engines[w.rank]))
    path = run.checkpoint_path(10)
    state, rows = read_json(path / "state.json"), {}
    for name, kind, start, size, _, rank, count, rank_step, step in state["fragments"]:
        for i in range(count):
            file = f"rank-{rank + i * rank_step:05d}.safetensors"
            rows.setdefault(file, []).append([name, kind, start + i * step, size])
    write_json(path / "state.json", state | {"format": 3, "fragments": rows})
    table = {p.name: storage.hash_file(p) for p in path.iterdir() if p.name != TABLE}
    write_table(path, table)
    assert plain.step_in(Checkpoint(path)) == 10
    for world in plain.worlds(2):
        other = plain.engine(world, width=5)
        writer.load(Checkpoint(path), other)
        assert {float(p.detach().min()) for p in other.module.parameters()} == {10.0}


def test_a_checkpoint_of_another_model_is_refused(run):
    with pytest.raises(UserError, match=r"0\.bias is \[4\] there and \[6\] in this model"):
        writer.load(Checkpoint(run.checkpoint_path(20)), plain.engine(width=3))


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


def planted(run, change):
    """Change a checkpoint and make its table agree, as somebody would who means harm."""
    path = run.checkpoint_path(20)
    change(path)
    table = {p.name: storage.hash_file(p) for p in path.iterdir() if p.name != TABLE}
    write_table(path, table)
    assert check_table(path) == []


def as_pickle(bomb):
    return pickle.dumps({"0.weight": bomb})


def as_torch_file(bomb):
    import io

    file = io.BytesIO()
    torch.save({"0.weight": bomb}, file)
    return file.getvalue()


def as_header(bomb):
    header = json.dumps({"__metadata__": {"x": "y"}, "a": pickle.dumps(bomb).hex()}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize("kind", [as_pickle, as_torch_file, as_header])
def test_a_planted_pickle_is_refused_and_never_run(run, tmp_path, kind):
    mark = tmp_path / "it-ran"
    data = kind(Bomb(mark))
    planted(run, lambda path: (path / "rank-00000.safetensors").write_bytes(data))
    checkpoint = newest_complete(run, Reports())
    for look in (
        lambda: writer.load(checkpoint, plain.engine(width=2)),
        lambda: dict(checkpoint.weights()),
        lambda: checkpoint.tensor("offset"),
    ):
        with pytest.raises(UserError, match="not a safetensors file"):
            look()
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb is a dud"


@pytest.mark.parametrize("name", ["state.json", "files.json"])
def test_a_pickle_in_place_of_json_is_refused_and_never_run(run, tmp_path, name):
    mark = tmp_path / "it-ran"
    data = pickle.dumps(Bomb(mark))
    if name == "files.json":
        (run.checkpoint_path(20) / name).write_bytes(data)
        assert chosen(run) == (10, [("checkpoint_damaged", 20)])
    else:
        planted(run, lambda path: (path / name).write_bytes(data))
        with pytest.raises(UserError, match=r"state\.json: not valid JSON"):
            newest_complete(run, Reports())
    assert not mark.exists()


def test_a_state_that_names_files_elsewhere_is_refused(run, tmp_path):
    secret = tmp_path / "secret.safetensors"
    shutil.copy(run.checkpoint_path(10) / "rank-00000.safetensors", secret)

    def point_there(path):
        state = read_json(path / "state.json")
        rows = [[*row[:4]] for row in state["fragments"]]
        state |= {"format": 3, "fragments": {"../../../secret.safetensors": rows}}
        write_json(path / "state.json", state)

    planted(run, point_there)
    with pytest.raises(UserError, match="names a file outside its directory"):
        writer.load(newest_complete(run, Reports()), plain.engine(width=2))


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ([1, 1, 0, 0], "are in files of ranks"),
        ([0, 2, 1, 4], "are in files of ranks"),
        ([0, 2, -1, 4], "are in files of ranks"),
        ([0, 2, 0, 0], "have no distance"),
        ([0, 2**62, 0, 1], "have no distance"),  # who counted them would never end
    ],
)
def test_a_state_with_fragments_that_cannot_be_is_refused(run, place, why):
    def point_there(path):
        state = read_json(path / "state.json")
        state["fragments"][0][5:] = place
        write_json(path / "state.json", state)

    planted(run, point_there)
    with pytest.raises(UserError, match=rf"is damaged: .*fragments of 0\.weight {why}"):
        newest_complete(run, Reports())


def test_a_stored_config_that_names_a_target_imports_nothing(own_run, tmp_path, monkeypatch):
    """A run that somebody sent: looking into it and loading from it run none of its code."""
    module = tmp_path / "planted.py"
    module.write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')\nclass Model: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = yaml.safe_load(own_run.config.read_text())
    own_run.config.write_text(yaml.safe_dump({**config, "model": {"_target_": "planted.Model"}}))
    view = forescale.open_run(own_run.path)
    with pytest.raises(UserError, match="planted"):
        thaw(TrainJob, own_run.config)
    with pytest.raises(UserError, match="planted"):
        view.model()
    assert dict(view.checkpoint().weights())  # tensors need no class
    assert len(view.metrics()) == 8
    assert not (tmp_path / "it-ran").exists()
