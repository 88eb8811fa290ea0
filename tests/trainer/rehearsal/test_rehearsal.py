"""Rehearsals beside the plan, which real ranks have confirmed (test_real_costs.py)."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from forescale.rehearsal import depth
from forescale.verbs import rehearse

HERE = Path(__file__).parent
TINY = ("model.width=256", "model.num_heads=4", "model.num_layers=2", "train.sequence_length=256")
JOB = (*TINY, "plan.gpus=8", "train.micro_batch=2", "train.global_batch=64", "train.steps=10")


@cache
def rehearsed(*words: str) -> tuple[int, dict, str]:
    """Return exit code, JSON and standard error of a rehearsal."""
    command = [sys.executable, "-m", "forescale", "rehearse", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=False)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_rank_sends_what_the_plan_says(engine, optimizer):
    code, facts, text = rehearsed(*JOB, f"engine={engine}", f"optimizer={optimizer}",
                                  "rehearse.kernels=off")  # fmt: skip
    assert code == 0, text
    planned: dict[tuple[str, int], list[int]] = {}
    for c in facts["planned"]["collectives"]:
        entry = planned.setdefault((c["kind"], c["ranks"]), [0, 0])
        entry[0], entry[1] = entry[0] + c["payload"], entry[1] + c["calls"]
    (report,) = facts["ranks"]
    counted = {(c["kind"], c["ranks"]): c["bytes"] for c in report["collectives"]}
    few = 4096  # bytes of the norm and the summary of a step
    assert counted.keys() >= planned.keys()
    for key, payload in counted.items():
        assert 0 <= payload - planned.get(key, [0])[0] < few, key
    between, states = report["between_bytes"], facts["planned"]["memory_bytes"]["between steps"]
    assert between == pytest.approx(states, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_shallow_depths_tell_all_of_a_deep_model(engine, monkeypatch, capfd):
    words = [*JOB, "model.num_layers=7", f"engine={engine}", "--json", "rehearse.kernels=off"]
    monkeypatch.setattr(depth, "_MOST", 1.0)
    assert rehearse.main(words) == 0
    from_two = json.loads(capfd.readouterr().out)
    assert from_two["depths"] == [2, 4]
    monkeypatch.undo()
    assert rehearse.main(words) == 0
    whole = json.loads(capfd.readouterr().out)
    assert whole["depths"] is None
    (two,), (all_,) = from_two["ranks"], whole["ranks"]
    assert two["waits"] == all_["waits"]
    for one, other in zip(two["collectives"], all_["collectives"], strict=True):
        assert (one["kind"], one["calls"]) == (other["kind"], other["calls"])
        # Of stage 3, the weights that are used again while they are there.
        assert one["bytes"] == pytest.approx(other["bytes"], rel=0.03 if engine == "zero3" else 0)
    # Blocks of 512 bytes, and the parameters that the border of a partition cuts.
    for key in ("between_bytes", "peak_bytes"):
        assert two[key] == pytest.approx(all_[key], rel=0.02)
    launches = [sum(each["times"] for each in one["operations"]) for one in (two, all_)]
    assert launches[0] == pytest.approx(launches[1], rel=0.02)
