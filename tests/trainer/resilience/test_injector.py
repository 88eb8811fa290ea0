"""Faults are read or refused in a sentence; each strikes where it says, once a run."""

import errno
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forescale.config.compose import ConfigError, compose
from forescale.config.sections.faults import KINDS, PLACES, ROUND, Fault, problems, read
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.resilience import injector as module
from forescale.resilience.injector import Injected, damage, flip_a_weight, injector_of, records
from forescale.resilience.phases import PhaseTimer
from forescale.run.directory import Run
from forescale.run.rows import read_rows

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill@120:rank1", Fault("kill", 120, 1)),
        ("freeze@30:rank1:data", Fault("freeze", 30, 1, "data")),
        ("hang@7:data:rank12", Fault("hang", 7, 12, "data")),
        ("nan@40", Fault("nan", 40)),
        (" exit@1:update ", Fault("exit", 1, 0, "update")),
    ],
)
def test_a_fault_is_read(text, fault):
    assert read(text) == fault


@given(
    st.sampled_from(sorted(KINDS)),
    st.integers(1, 10**9),
    st.integers(0, 4000),
    st.sampled_from(PLACES),
)
def test_what_is_written_is_read_again(kind, step, rank, place):
    placed = kind in ("kill", "freeze", "hang", "exit", "slow")
    fault = Fault(kind, step, rank, place if placed else "forward")
    assert read(str(fault)) == fault


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kil@10", "the nearest is kill"),
        ("freze@3:rank1", "the nearest is freeze"),
        ("enospace@3", "the nearest is enospc"),
        ("kill", "write, for example, kill@120:rank1"),
        ("kill@", "is not KIND@STEP"),
        ("kill@x", "is not KIND@STEP"),
        ("kill@-3", "is not KIND@STEP"),
        ("", "is not KIND@STEP"),
        ("kill@0", "the first step is 1"),
        ("kill@5:rank1:dta", "the nearest is data"),
        ("kill@5:ranl1", "the nearest is rank1"),
        ("kill@5:rank1:rank2", "names two ranks"),
        ("kill@5:norm:data", "names two places"),
        ("nan@5:data", "nan takes no place"),
    ],
)
def test_a_wrong_one_is_a_sentence(text, says):
    with pytest.raises(UserError) as e:
        read(text)
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def test_all_problems_come_at_once():
    faults = problems(["kil@1", "kill@3", "kill@3:rank0", "nan@9:rank2", "nan@41", "ok"], 2, 40)
    sentences = "\n".join(": ".join(p) for p in faults)
    for says in ("kil@1", "is given twice", "there is no rank 2", "last step, 40", "'ok'"):
        assert says in sentences
    assert len(faults) == 5
    assert problems(["kill@99:rank7"]) == []  # as long as ranks and steps are not known


SHORT = ("train.steps=40", "schedule.warmup=2", "schedule.decay=10", "train.micro_batch=2")


def test_the_command_line_takes_a_list_of_them():
    faults = ["kill@12:rank1", "freeze@30:rank1:data", "nan@40"]
    overrides = [f"faults=[{','.join(faults)}]", "launch.processes=2"]
    assert compose(TrainJob, [*overrides, *SHORT]).faults == faults


def test_the_command_line_refuses_wrong_ones():
    with pytest.raises(ConfigError) as e:
        compose(TrainJob, ["faults=[kil@1,kill@41,nan@3:rank2]", "launch.processes=2", *SHORT])
    assert "nearest is kill" in str(e.value)
    assert "last step, 40" in str(e.value)
    assert "there is no rank 2" in str(e.value)


@pytest.fixture
def run(tmp_path) -> Run:
    new = Run(tmp_path / "run")
    new.new_attempt()
    return new


def inject(run, *faults, rank=0, phases=None):
    phases = phases or PhaseTimer("startup")
    return injector_of(faults, rank, run, run.attempts()[-1], phases), phases


def make(phases: PhaseTimer, injector, step: int, micro_batches: int = 1) -> list[str]:
    """Make a step as the loop does: the places that the rank comes to."""
    calls: list[str] = []
    hook = phases.hook

    def hear():
        calls.append(phases.at)
        hook()

    phases.hook = hear
    phases.enter("compute")
    try:
        with phases("data"):
            pass
        phases.step = step
        with phases("compute"):
            if injector is not None:
                injector.disturb(step, torch.nn.Linear(2, 2))
            for _ in range(micro_batches):
                phases.mark("forward")
                phases.mark("backward")
            phases.mark("norm")
            phases.mark("update")
        phases.mark("summary")
        for phase in ("evaluation", "checkpoint"):
            with phases(phase):
                pass
    finally:
        phases.hook = hook
    return calls


# Those of a round with other clusters are in tests/distributed/test_outer.py.
@pytest.mark.parametrize("place", [p for p in PLACES if p not in ("write", *ROUND)])
def test_it_strikes_in_its_step_at_its_place_and_once_a_run(run, place):
    injector, phases = inject(run, f"exit@3:{place}")
    for step in (1, 2):
        make(phases, injector, step)
    with pytest.raises(Injected, match="exit@3"):
        make(phases, injector, 3)
    assert phases.step == (2 if place == "data" else 3)  # its data comes before it begins
    injector.begin(run.attempts()[0], 2)
    make(phases, injector, 3)  # made again, after a rollback
    run.new_attempt()
    assert inject(run, f"exit@3:{place}")[0] is None  # and in a later one
    (row,) = records(run)
    assert (row["fault"], row["at"]) == (str(read(f"exit@3:{place}")), place)


def test_the_data_of_an_attempts_first_step_is_that_steps(run):
    injector, phases = inject(run, "exit@21:data", "exit@26:data", "exit@1:data")
    injector.begin(run.attempts()[0], 20)  # a resumed run
    with pytest.raises(Injected, match="exit@21"):
        make(phases, injector, 21)
    for step in range(21, 26):
        make(phases, injector, step)
    second = run.new_attempt()
    injector.begin(second, 20)  # a rollback: the phases still stands at 25
    for step in range(21, 26):
        make(phases, injector, step)
    with pytest.raises(Injected, match="exit@26"):
        make(phases, injector, 26)
    assert (second.path / "faults-rank-0.jsonl").exists()


def test_it_is_on_disk_before_it_strikes_and_rank_0_tells(run):
    injector, phases = inject(run, "exit@1:rank0", "exit@1:rank1")
    before = time.time()
    with pytest.raises(Injected):
        make(phases, injector, 1)
    (row,) = read_rows(run.attempts()[0].path / "faults-rank-0.jsonl")
    assert row["fault"] == "exit@1:rank0"
    assert before <= row["time"] <= time.time()
    (event,) = read_rows(run.attempts()[0].events.path)
    assert (event["kind"], event["fault"], event["step"]) == ("fault_injected", "exit@1:rank0", 1)
    other, phases = inject(run, "exit@1:rank0", "exit@1:rank1", rank=1)
    with pytest.raises(Injected):
        make(phases, other, 1)
    assert len(read_rows(run.attempts()[0].events.path)) == 1  # one process writes a file
    assert [row["fault"] for row in records(run)] == ["exit@1:rank0", "exit@1:rank1"]


def test_a_run_without_faults_has_no_injector(run):
    injector, phases = inject(run)
    assert injector is None
    assert phases.hook is None
    assert inject(run, "kill@3:rank1", rank=0)[0] is None


def test_the_gradient_is_multiplied_in_one_step(run):
    injector, _ = inject(run, "nan@2", "spike@3", "spike@3:rank1")
    layer = torch.nn.Linear(2, 2)
    factors = [injector.disturb(step, layer) for step in (1, 2, 2, 3, 3)]
    assert factors[0] == factors[2] == factors[4] == 1.0
    assert math.isnan(factors[1])
    assert factors[3] == 1000.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bit_of_one_weight_flips(run, dtype):
    injector, _ = inject(run, "flip@2")
    layer = torch.nn.Linear(8, 8).to(dtype)
    before = layer.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    assert injector.disturb(1, layer) == 1.0
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert injector.disturb(2, layer) == 1.0
    assert torch.equal(before["bias"], layer.bias)
    (changed,) = (before["weight"] != layer.weight).nonzero().tolist()
    old, new = before["weight"][*changed].item(), layer.weight[*changed].item()
    assert new in (old * 2, old / 2)


def test_a_partitioned_weight_flips_where_the_rank_holds_it():
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.empty(0))
    layer.weight.ds_tensor = torch.ones(4, dtype=torch.bfloat16)
    flip_a_weight(layer)
    assert sorted(layer.weight.ds_tensor.tolist()) == [0.5, 1.0, 1.0, 1.0]


def publish(run: Run, step: int) -> Path:
    path = run.checkpoint_path(step)
    path.mkdir(parents=True)
    (path / "state.json").write_bytes(b"{}")
    (path / "rank-00000.safetensors").write_bytes(bytes(1000))
    return path


def test_the_newest_checkpoint_is_damaged_as_soon_as_there_is_one(run):
    injector, phases = inject(run, "corrupt@2")
    for step in (1, 2, 3):
        make(phases, injector, step)
    assert not records(run)
    old, new = publish(run, 3), publish(run, 4)
    make(phases, injector, 4)
    make(phases, injector, 5)
    contents = [(p / "rank-00000.safetensors").read_bytes() for p in (old, new)]
    assert contents[0] == bytes(1000)
    assert sum(byte.bit_count() for byte in contents[1]) == 1
    assert len(contents[1]) == 1000


def test_damage_strikes_the_largest_file(run):
    assert damage(publish(run, 1)).name == "rank-00000.safetensors"


def test_the_next_checkpoint_finds_the_disk_full(run):
    injector, phases = inject(run, "enospc@15")
    make(phases, injector, 15)
    injector.writing(10, Path("rank-00000.safetensors"))
    with pytest.raises(OSError, match="rank-00000") as e:
        injector.writing(20, Path("rank-00000.safetensors"))
    assert e.value.errno == errno.ENOSPC
    injector.writing(20, Path("rank-00000.safetensors"))  # the same command again


def test_a_fault_strikes_while_a_checkpoint_is_written(run):
    injector, phases = inject(run, "exit@15:write")
    make(phases, injector, 15)
    with pytest.raises(Injected):
        injector.writing(20, Path("f"))
    injector.writing(30, Path("f"))


def test_a_slow_rank_sleeps_once_a_step_for_twenty_steps(run, monkeypatch):
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    injector, phases = inject(run, "slow@3")
    for step in range(1, 40):
        make(phases, injector, step, micro_batches=4)
        assert len(slept) == max(0, min(step - 2, 20))
    assert set(slept) == {0.1}


CHILD = """
import signal, sys, time
from pathlib import Path
from forescale.resilience.injector import injector_of
from forescale.resilience.phases import PhaseTimer
from forescale.run.directory import Run
def answer(*_):
    print("answered", flush=True)
    raise SystemExit(7)
signal.signal(signal.SIGTERM, answer)
run, phases = Run(sys.argv[1]), PhaseTimer("startup")
injector_of([sys.argv[2]], 0, run, run.attempts()[-1], phases)
print("ready", flush=True)
phases.step = 5
phases.mark("forward")
print("went on", flush=True)
"""


@pytest.fixture
def child(run):
    """Starts a process that makes step 5 under a fault, as soon as it is ready."""
    injectors = []

    def begin(fault):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(run.path), fault], stdout=subprocess.PIPE, text=True
        )
        injectors.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in injectors:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_kill_is_sigkill(run, child):
    process = child("kill@5")
    assert process.wait(60) == -signal.SIGKILL
    assert process.stdout.read() == ""
    assert [row["fault"] for row in records(run)] == ["kill@5:rank0"]


def test_freeze_is_sigstop(run, child):
    process = child("freeze@5")
    state = Path(f"/proc/{process.pid}/stat")
    wait_for(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
    assert [row["fault"] for row in records(run)] == ["freeze@5:rank0"]
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0
    assert process.stdout.read() == "went on\n"


def test_a_hanging_rank_still_answers(run, child):
    process = child("hang@5")
    wait_for(lambda: records(run))
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 7
    assert process.stdout.read() == "answered\n"


def test_a_record_that_a_kill_cut_short_is_no_fault_that_struck(run):
    path = run.attempts()[0].path / "faults-rank-0.jsonl"
    whole = json.dumps({"fault": "kill@3:rank0", "time": 1.0}) + "\n"
    path.write_text(whole + '{"fault": "kill@5:ra')
    injector, _ = inject(run, "kill@3", "kill@5")
    assert injector is not None
    assert [row["fault"] for row in records(run)] == ["kill@3:rank0"]
