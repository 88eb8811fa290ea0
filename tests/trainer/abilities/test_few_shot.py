"""Accuracy on made tasks: who knows the rule is right, who doesn't is at chance."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from forescale.abilities.few_shot import Accuracy, _row, accuracies
from forescale.abilities.tasks import TASKS


def encode(text):
    return [ord(c) for c in text]


class Solver:
    """A model that reads the last question, and writes what `rule` says, with certainty."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, tokens_BL):
        logits = torch.zeros(*tokens_BL.shape, 128)
        for b, row in enumerate(tokens_BL.tolist()):
            text = "".join(map(chr, row)).rstrip("\0")
            question = text[: text.rindex(" ->")].rpartition("\n")[2].removeprefix("\1")
            start = text.rindex(" ->") + 2
            for i, c in enumerate(f" {self.rule(question)}\n"):
                if start + i < tokens_BL.shape[1]:
                    logits[b, start + i, ord(c)] = 50.0
        return logits


RULES = {
    "copy": lambda q: q,
    "reverse": lambda q: q[::-1],
    "addition": lambda q: str((int(q[0]) + int(q[4])) % 10),
    "recall": lambda q: dict(p.split(" ") for p in q.split("; ")[0].split(", "))[q[-1]],
}


@pytest.mark.parametrize("task", TASKS)
def test_who_knows_the_rule_answers_all(task):
    found = list(accuracies(Solver(RULES[task]), encode, 1, 512, [task], [0, 3], questions=32))
    assert [(name, shots, a.right) for name, shots, a in found] == [(task, 0, 32), (task, 3, 32)]
    assert found[0][2].nats < 1e-6


@pytest.mark.parametrize("task", ["addition", "recall"])
def test_who_guesses_is_at_chance(task):
    rng = np.random.default_rng(0)
    guess = {
        "addition": lambda q: str(rng.integers(10)),
        "recall": lambda q: rng.choice([p.split(" ")[1] for p in q.split("; ")[0].split(", ")]),
    }[task]
    (_, _, found), *_ = accuracies(Solver(guess), encode, 1, 512, [task], [1], questions=400)
    assert binomtest(found.right, 400, TASKS[task].chance).pvalue > 0.01


def test_a_question_is_the_same_after_any_number_of_examples():
    rows = [_row("recall", 7, shots, encode, 1, 0) for shots in (0, 2, 5)]
    assert len({tuple(ids[-count - 20 :]) for ids, count in rows}) == 1
    assert [chr_count(ids) for ids, _ in rows] == [1, 3, 6]


def chr_count(ids):
    return sum(i == ord("\n") for i in ids)


def test_examples_that_do_not_fit_are_not_judged():
    found = list(accuracies(Solver(RULES["copy"]), encode, 1, 60, ["copy"], [0, 16], questions=4))
    assert [a is None for *_, a in found] == [False, True]


def test_intervals_are_wilsons():
    exact = binomtest(3, 40).proportion_ci(0.9, "wilson")
    assert Accuracy("copy", 0, 3, 40, 1.0).interval == pytest.approx((exact.low, exact.high))
    assert Accuracy("copy", 0, 0, 40, 1.0).interval[0] == 0
