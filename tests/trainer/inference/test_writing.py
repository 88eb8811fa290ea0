"""Several answers at once, begun at different steps: each is the one that it is alone."""

import pytest
import torch
from tokenizers import Tokenizer

from forescale.data.tokenizer import byte_tokenizer
from forescale.errors import UserError
from forescale.inference.answering import Question
from forescale.inference.writing import Answer, Wanted, Writing, write, written
from forescale.models import ModelConfig, Transformer
from forescale.models.decoding.sampler import Sampler

SIZES = dict(num_layers=2, width=32, num_heads=2, vocab_size=257, init_std=0.3)
CONTEXT = 12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SIZES, max_sequence_length=CONTEXT)).eval()


def answer(tokenizer: Tokenizer, text: str, most: int, seed: int, temperature: float) -> Answer:
    ids = tokenizer.encode(text).ids
    question = Question(text, text, ids, ids, -1, "document", CONTEXT)
    wanted = Wanted(most, Sampler(temperature, repetition_penalty=1.2 + temperature))
    return Answer(tokenizer, question, wanted, seed)


# Some leave the context, one begins beyond it, two draw, each by rules of its own.
ASKED = [("abcdefg", 9, 0, 0.0), ("b", 4, 1, 0.0), ("cd" * 9, 5, 2, 0.0), ("de", 14, 3, 0.8)]
ASKED += [("efghi", 3, 4, 1.1), ("f", 8, 5, 0.0), ("gh" * 5, 6, 6, 0.0)]


def alone(model, tokenizer) -> list[str]:
    found = [answer(tokenizer, *asked) for asked in ASKED]
    for one in found:
        for _ in write(model, [one]):
            pass
    return [one.text for one in found]


def test_answers_that_join_and_leave_are_those_that_each_is_alone(model):
    tokenizer = byte_tokenizer()
    want, found = alone(model, tokenizer), [answer(tokenizer, *asked) for asked in ASKED]
    writing, pieces = Writing(model), {id(one): "" for one in found}
    for number in range(30):
        writing.add(found[number : number + 1] if number < 4 else found[4:] if number == 4 else [])
        for one, piece in writing.step():
            pieces[id(one)] += piece
    assert not writing.answers
    assert [one.text for one in found] == [*pieces.values()] == want
    assert len(set(want)) == len(want)


def test_at_most_so_many_are_written_at_once_and_come_in_order(model, monkeypatch):
    tokenizer, at_once = byte_tokenizer(), []
    found = [answer(tokenizer, *asked) for asked in ASKED]
    step = Writing.step
    monkeypatch.setattr(
        Writing, "step", lambda self: [at_once.append(len(self.answers)), step(self)][1]
    )
    assert [one.text for one in written(model, found, 3)] == alone(model, tokenizer)
    assert max(at_once[: sum(asked[1] for asked in ASKED) // 3]) == 3


def test_an_answer_that_nobody_waits_for_leaves(model):
    tokenizer = byte_tokenizer()
    first, second = (answer(tokenizer, *asked) for asked in ASKED[:2])
    writing = Writing(model)
    writing.add([first, second])
    writing.step()
    first.reason = "length"
    writing.step()
    assert writing.answers == [second]
    assert first.num_tokens == 1


class Constant(torch.nn.Module):
    """A model with the same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)


def of_constant(logits: list[float], temperature: float) -> str:
    question = Question("", "", [0], [], -1, "document", 8)
    asked = Answer(byte_tokenizer(), question, Wanted(3, Sampler(temperature)), 0)
    return "".join(piece for _, piece in write(Constant(logits), [asked]))


def test_a_model_whose_logits_are_finite_is_sampled():
    expected = byte_tokenizer().decode([1, 1, 1])
    assert of_constant([float("-inf"), 0.0], 1.0) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_is_refused_with_a_sentence(temperature):
    with pytest.raises(UserError, match=r"the model: can't write text .*; use an earlier checkp"):
        of_constant([0.0, float("nan")], temperature)
