"""Muon's gathers, by hand, and as counted in rehearsals of the same jobs (8 ranks)."""

from dataclasses import replace

import pytest

from forescale.config.compose import compose
from forescale.plan.bytes.memory import partition, states
from forescale.plan.bytes.muon import gathers
from forescale.plan.bytes.parameters import Parameter, inventory
from forescale.plan.bytes.zero import ZeroSettings
from forescale.plan.communication import collectives
from forescale.plan.config import PlanJob

TINY = ("model.width=256", "model.num_heads=4", "model.num_layers=2", "train.sequence_length=256")
MATRICES = 1_605_632  # elements that Muon updates


def job(*words):
    of = compose(PlanJob, [*TINY, "optimizer=muon", "train.micro_batch=2", "train.global_batch=32",
                           "precision=bf16", *words])  # fmt: skip
    return replace(of, model=of.model.resolved(4096, of.train.sequence_length))


def gathered(planned):
    traffic = collectives(planned, inventory(planned), 8)
    return sum(c.payload for c in traffic if c.label == "Muon's matrices")


@pytest.mark.parametrize(
    ("engine", "payload", "between", "update"),
    [  # bytes of a step, then of buffers between steps and of what Muon has beside them
        ("zero2-offload", 8 * MATRICES, 3 * 9 * 4 * MATRICES // 8, 8 * MATRICES),
        ("zero3-offload", 4 * MATRICES, 9 * 4 * MATRICES // 8, 4 * MATRICES + MATRICES),
        ("zero3", 2 * (MATRICES // 8 + 245_760), 0, 2 * (MATRICES // 8 + 3 * 245_760)),
    ],
)
def test_muon_gathers_as_in_a_rehearsal(engine, payload, between, update):
    planned = job(f"engine={engine}")
    assert gathered(planned) == payload
    of_rank = states(planned, inventory(planned), 8, 0)
    by_element = job(f"engine={engine}", "optimizer=adamw")
    other = states(by_element, inventory(by_element), 8, 0)
    assert of_rank.matrices == update
    assert of_rank.stays - other.stays == between


def test_what_an_update_needs_does_not_grow_with_the_ranks():
    planned = job("engine=zero3")
    held = inventory(planned)
    few, many = (states(planned, held, n).matrices for n in (16, 512))
    assert many <= few


def test_offloaded_matrices_beyond_a_batch_are_gathered_in_chunks():
    s = ZeroSettings.of(job("engine=zero2-offload"), 8)
    of = next(g for g in inventory(job()).groups if g.update.is_by_matrix)
    params = [Parameter(str(n), (4096, 4096)) for n in range(3)]  # 16M elements: a batch each
    group = replace(of, params=params)
    each = gathers(s, group, 8, partition(group, 8))
    chunk = (64 << 20) // (2 * 4 * 9)
    assert each.calls == 3 * -(-(3 * 4096 * 4096 // 8) // chunk)
    assert (each.payload, each.most) == (8 * 8 * chunk * each.calls, 8 * 4096 * 4096)
