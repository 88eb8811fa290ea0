"""The names of abilities in rows and records, the line that shows them, and prompts."""

from dataclasses import replace

import pytest

from forescale.config.abilities import SHOTS, TASKS
from forescale.ground.errors import UserError
from forescale.run.abilities import KINDS, Accuracy, Column, column_of, in_words
from forescale.run.start import start
from tests.trainer.small_run import make_job


def test_every_name_of_a_column_is_read_back():
    for task in TASKS:
        for shots in SHOTS:
            read = [column_of(name) for name in Accuracy(task, shots, 3, 40, 1.5, 0.1).columns]
            assert read == [(task, shots, kind) for kind in KINDS]
    assert column_of("ability/my_own_nats/16_nats") == Column("my_own_nats", 16, "nats")


@pytest.mark.parametrize(
    "name",
    ["loss", "ability/", "ability/copy", "ability/copy/four", "ability/copy/4_more",
     "ability/copy/04", "ability/copy/4_share", "validation/ability/copy/4"],
)  # fmt: skip
def test_other_names_are_of_something_else(name):
    assert column_of(name) is None


def test_a_row_in_words_has_the_shares_alone_in_the_order_of_the_examples():
    results = [Accuracy("copy", 4, 3, 40, 1.5), Accuracy("copy", 8, 20, 40, 1.0)]
    results.append(Accuracy("recall", 8, 10, 40, 1.0))  # its 4 examples were not measured
    row = {"loss": 2.5, **{name: x for one in results for name, x in one.columns.items()}}
    assert in_words(row) == "right answers after 4, 8 examples: copy 8 %, 50 %; recall -, 25 %"
    assert in_words({"loss": 2.5}) == ""


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [("x" * 30, "31 tokens, 8 are to follow, and train.sequence_length is"), ("\udc80", "half a")],
)
def test_a_prompt_that_is_no_text_or_too_long_is_refused_before_the_run_is_made(
    small_data, tmp_path, prompt, sentence
):
    job = make_job(small_data, tmp_path, "new", "validation.prompt_tokens=8")
    job = replace(job, validation=replace(job.validation, prompts=["def", prompt]))
    with pytest.raises(UserError, match=sentence):
        start(job)
    assert not (tmp_path / "new").exists()
