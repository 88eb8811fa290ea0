"""Accuracy on made tasks: who knows the rule is right, who doesn't is at chance."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from forescale.config.abilities import TASKS, question_row
from forescale.engine.ranks import Ranks
from forescale.ground.errors import UserError
from forescale.run.abilities import Accuracy, expect_fitting, questions_of
from forescale.train.abilities import IGNORED, accuracies, judged


def encode(text):
    return [ord(c) for c in text]


def measured(logits, tasks, shots, questions):
    questions_made = questions_of(encode, 1, tasks, shots, questions=questions)
    return accuracies(lambda tokens, targets: judged(logits(tokens), targets), questions_made)


class Solver:
    """A model that reads the last question, and writes what `rule` says, with certainty."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, tokens_BL):
        logits = torch.zeros(*tokens_BL.shape, 128)
        for b, row in enumerate(tokens_BL.tolist()):
            if not (text := "".join(map(chr, row)).rstrip("\0")):
                continue  # padding
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
    results = measured(Solver(RULES[task]), [task], [0, 3], questions=32)
    assert [(a.task, a.shots, a.right) for a in results] == [(task, 0, 32), (task, 3, 32)]
    assert results[0].nats < 1e-6


@pytest.mark.parametrize("task", ["addition", "recall"])
def test_who_guesses_is_at_chance(task):
    rng = np.random.default_rng(0)
    guess = {
        "addition": lambda q: str(rng.integers(10)),
        "recall": lambda q: rng.choice([p.split(" ")[1] for p in q.split("; ")[0].split(", ")]),
    }[task]
    (result,) = measured(Solver(guess), [task], [1], questions=400)
    assert binomtest(result.right, 400, TASKS[task].chance).pvalue > 0.01


def test_a_question_is_the_same_after_any_number_of_examples():
    rows = [question_row("recall", 7, shots, encode, 1, 0) for shots in (0, 2, 5)]
    assert len({tuple(ids[-count - 20 :]) for ids, count in rows}) == 1
    assert [chr_count(ids) for ids, _ in rows] == [1, 3, 6]


def chr_count(ids):
    return sum(i == ord("\n") for i in ids)


def test_examples_that_do_not_fit_are_refused_with_the_length_that_they_need():
    questions = questions_of(encode, 1, ["copy"], [0, 16], questions=4)
    longest = questions[1].longest
    expect_fitting(questions, longest, "shots", "length")
    with pytest.raises(UserError, match=f"shots: 16 examples of copy .* at least {longest}"):
        expect_fitting(questions, longest - 1, "shots", "length")


def test_ranks_that_share_the_questions_find_the_same_as_one():
    """Each makes as many passes, all of one shape, because at ZeRO stage 3 they are collectives."""
    model, shapes = Solver(lambda question: question[:1]), [[] for _ in range(4)]
    questions = questions_of(encode, 1, ["recall", "addition"], [0, 2], questions=5)
    parts = []

    class One(Ranks):
        def reduce_on_main(self, answers, work):
            parts.append(answers)
            return work(parts) if self.rank == 3 else []

    def answer(rank):
        def judge(tokens, targets):
            shapes[rank].append(tuple(tokens.shape))
            return judged(model(tokens), targets)

        return accuracies(judge, questions, rows=4, multiple=7, ranks=One(rank, 4))

    *_, results = map(answer, range(4))
    assert all(of == shapes[0] for of in shapes)
    assert len(set(shapes[0])) == 1
    assert shapes[0][0][1] % 7 == 0
    alone = measured(model, ["recall", "addition"], [0, 2], questions=5)
    assert results == alone


def test_who_is_nearly_right_is_wrong_and_the_nats_are_those_of_the_answer_alone():
    targets = torch.tensor([[IGNORED, 3, 1, IGNORED], [IGNORED, 2, IGNORED, IGNORED]])
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    logits[0, 1, 3] = logits[1, 1, 2] = 9.0
    logits[0, 2, 4] = 9.0
    wrong, nats = judged(logits, targets)
    assert wrong.tolist() == [1, 0]
    sums = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none").sum(1)
    assert nats.tolist() == pytest.approx(sums.tolist(), rel=1e-5)


def test_columns_are_named_by_task_and_examples():
    accuracy = Accuracy("copy", 4, 3, 40, 1.5, 0.1)
    named = accuracy.columns
    assert [*named] == [f"ability/copy/4{end}" for end in ("", "_stderr", "_nats", "_nats_stderr")]
    assert named["ability/copy/4"] == 3 / 40
    low, high = accuracy.interval
    assert named["ability/copy/4_stderr"] == pytest.approx((high - low) / 2 / 1.6448536)
    assert Accuracy("copy", 4, 0, 40, 1.5).stderr > 0


def test_intervals_are_wilsons():
    exact = binomtest(3, 40).proportion_ci(0.9, "wilson")
    assert Accuracy("copy", 0, 3, 40, 1.0).interval == pytest.approx((exact.low, exact.high))
    assert Accuracy("copy", 0, 0, 40, 1.0).interval[0] == 0
