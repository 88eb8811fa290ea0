"""The ids of a tokenizer's special tokens that an objective takes."""

import pytest

from forescale.run.start import start
from tests.trainer.small_run import make_job, make_run

SMALL = ["model.num_layers=1", "model.width=32", "model.num_heads=2"]


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["objective=seq2seq"], ["  sentinels: null\n", "  around: null\n"]),
        (["objective=masked", "model.causal=false"], ["  mask_token: null\n"]),
    ],
)
def test_a_run_that_began_before_there_were_such_keys_goes_on(words, lines, small_data, tmp_path):
    """Of a tokenizer without such tokens: the ids are those behind it, as they were."""
    run = make_run(small_data, tmp_path, "old", *SMALL, *words)
    _, _, text = run.config.read_text().partition("\n")  # behind its checksum
    for line in lines:
        assert line in text
        text = text.replace(line, "")
    run.config.write_text(text)
    assert start(make_job(small_data, tmp_path, "old", *SMALL, *words)).run.path == run.path
