"""Rehearsals beside the plan, which real ranks have confirmed (test_real_costs.py)."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

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
