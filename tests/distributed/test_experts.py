"""Experts divided among real ranks, against one rank that has them all."""

from itertools import product

import pytest
import torch

from tests.distributed import ranks

pytestmark = pytest.mark.distributed

STEPS = 4
CAPACITY = "model.mlp.capacity=1.25"
KINDS = [
    [0, "adamw"],
    [0, "muon"],
    [1, "adamw"],
    [2, "adamw"],
    [1, "muon"],
    [2, "muon"],
    [1, "adamw", CAPACITY],
]
COLUMNS, MATRICES = "engine.sequence_parallel", "engine.tensor_parallel=2"
MESHES = {  # beside the 2 that divide the experts in each of KINDS; there are groups within groups
    2: [
        [0, "adamw", 2, f"{COLUMNS}=2"],
        [2, "muon", 2, f"{COLUMNS}=2"],
        [1, "muon", 2, MATRICES],
        [3, "adamw", 2],
    ],
    4: [
        [2, "adamw", 4, f"{COLUMNS}=2"],
        [1, "muon", 2, f"{COLUMNS}=4"],
        [0, "adamw", 2, MATRICES],
        [3, "adamw", 4, MATRICES, f"{COLUMNS}=2"],
        [3, "muon", 2, MATRICES],
    ],
}


def cases(parallel):
    return [[stage, kind, parallel, *words] for stage, kind, *words in KINDS]


@pytest.fixture(scope="module")
def alone():
    return ranks.run("expert_scenarios:trained", 1, cases=cases(1), steps=STEPS)


@pytest.mark.parametrize("size", [2, 4])
def test_divided_experts_train_as_those_of_one_rank(alone, size):
    """2 ranks divide the experts, of 2 and of 4: there each expert is on two ranks. Then also
    columns of windows or matrices are divided."""
    every = cases(2) + MESHES[size]
    results = ranks.run("expert_scenarios:trained", size, cases=every, steps=STEPS)
    same = {kind: alone[KINDS.index([1, kind])] for kind in ("adamw", "muon")}  # at any stage
    expected = alone + [same[kind] for _, kind, *_ in MESHES[size]]
    for case, divided, one in zip(every, results, expected, strict=True):
        first = [
            {k: v for k, v in of["states"][0].items() if "|weight" in k} for of in (divided, one)
        ]
        assert first[0] == first[1], case  # the initial weights, to the bit
        for state, expected in zip(divided["states"][1:], one["states"][1:], strict=True):
            assert state.keys() == expected.keys(), case
            for key, values in state.items():
                own_values, expected_values = torch.tensor(values), torch.tensor(expected[key])
                # Adam divides a gradient near 0 by its own size, and other sums round it otherwise.
                least = 1e-4 if MATRICES in case else 1e-5
                assert torch.allclose(own_values, expected_values, rtol=1e-4, atol=least), (
                    case,
                    key,
                )
        for row, expected in zip(divided["rows"], one["rows"], strict=True):
            assert row[:2] == pytest.approx(expected[:2], rel=1e-5, abs=1e-5), case
            assert row[2] == pytest.approx(expected[2], rel=1e-5), case
            loads = [[layer[:-1] for layer in counts] for counts in (row[3], expected[3])]
            assert loads[0] == loads[1], case  # all but the sums of entropies, in millionths
        for losses, expected in zip(divided["held_out"], one["held_out"], strict=True):
            assert losses == pytest.approx(expected, rel=1e-5), case
        assert divided["biases"] == one["biases"] * size, case


def test_any_division_reads_the_checkpoint_of_any_other_with_its_moments(tmp_path):
    """Of 1 rank, of 2 that divide the experts, of 4 in 2 groups, and with the columns divided: the
    same state in each, and the steps after it as without a stop, to the bit where the division is
    the same."""
    meshes = {
        1: [[1, "adamw", 1], [2, "muon", 1]],
        2: [[1, "adamw", 2, MATRICES], [2, "muon", 2, f"{COLUMNS}=2"]],
        4: [[3, "adamw", 2, f"{COLUMNS}=2"], [2, "muon", 2]],
    }
    names = {n: [f"{s}-{k}-{e}-w{n}" for s, k, e, *_ in meshes[n]] for n in meshes}
    after, states = {}, {}
    for size, cases_of in meshes.items():
        after[size] = ranks.run(
            "expert_scenarios:saved", size, cases=cases_of, folder=str(tmp_path)
        )
    for size, cases_of in meshes.items():
        every = [[case, [names[of][i] for of in names]] for i, case in enumerate(cases_of)]
        results = ranks.run("expert_scenarios:loaded", size, cases=every, folder=str(tmp_path))
        for (i, of), (state, steps) in zip(
            product(range(2), names), [pair for pairs in results for pair in pairs], strict=True
        ):
            assert state == states.setdefault((i, of), state), (i, of, size)
            if of == size:
                assert steps == after[of][i], (i, of)
            for row, expected in zip(steps, after[of][i], strict=True):
                assert row == pytest.approx(expected, rel=1e-5), (i, of, size)


def test_parts_are_compiled_around_the_exchange():
    cases = [
        [1, "adamw", 2, MATRICES],
        [1, "adamw", 2, CAPACITY, "model.activation_checkpointing=full"],
    ]
    for rows in ranks.run("expert_scenarios:compiled", 2, cases=cases, backend="aot_eager"):
        for plain, compiled in zip(rows[:2], rows[2:], strict=True):
            assert compiled == pytest.approx(plain, rel=1e-5)


def test_the_self_check_compares_experts_among_the_ranks_that_have_the_same():
    cases = [[1, "adamw", 2, MATRICES]]
    ((first, second, third),) = ranks.run("expert_scenarios:checked", 4, cases=cases)
    assert (first, second) == (None, None)
    assert "1 on here, 3 on here" in third
