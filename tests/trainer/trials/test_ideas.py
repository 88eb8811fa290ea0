"""A queue of ideas: pairs go to the promising ones, and the better ones are tried together."""

from pathlib import Path

import pytest

from forescale.trials.ledger import Ledger
from tests.trainer.trials.conftest import BASE, Simulated

IDEAS = """
gelu: [model.mlp=gelu]
relu: [model.mlp=relu2]
deep: [model.num_layers=5]
wrong: [model.mlp=nothing]
norm: [model.norm=layernorm]
"""


def pairs_of(name):
    ledger = Ledger(Path("campaigns/first/log.jsonl"))
    number = next(row["number"] for row in ledger.of("attempt") if row["name"] == name)
    return len(ledger.of("pair", attempt=number, stage="first"))


def test_the_better_half_has_the_next_pairs_and_winners_are_tried_together(tried):
    Path("ideas.yaml").write_text(IDEAS)
    Simulated.gains = {"gelu": 0.06, "norm": 0.05, "relu": -0.001, "gelu+norm": 0.1}
    code, out, _ = tried("ideas=ideas.yaml", "pairs=8", "gain=0.01", BASE)
    assert code == 0
    assert "wrong is left out: " in out
    assert "2 pairs each: gelu, relu, deep, norm." in out
    assert "Set aside, not yet known: " in out
    assert "gelu: better" in out.replace(", fresh seeds", "")
    assert pairs_of("relu") < pairs_of("gelu")
    assert "gelu+norm: gain +" in out
    assert "where the sum of the single gains is +" in out

    before = len(Simulated.names)
    assert tried("ideas=ideas.yaml", "pairs=8")[0] == 0
    assert len(Simulated.names) == before, "the same command trains nothing again"


@pytest.mark.parametrize("text", ["", "- a", "gelu: model.mlp=gelu", "gelu: [3]"])
def test_a_file_without_ideas_is_refused(tried, text):
    Path("ideas.yaml").write_text(text)
    code, _, err = tried("ideas=ideas.yaml", BASE)
    assert code == 2
    assert "write NAME: [KEY=VALUE, ...]" in err
