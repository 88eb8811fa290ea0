"""The plan's speeds beside 370 published ones, and its parameters and memory of the same jobs."""

from dataclasses import replace
from pathlib import Path

import pytest

from forescale.config.compose import compose
from forescale.plan.config import PlanJob
from forescale.plan.links import Collective
from forescale.plan.plan import Plan
from tests.benchmarks import plan_table
from tests.benchmarks.published import SOURCES, near, read, summary
from tests.benchmarks.published import groups as groups_of

ROWS = read()
# eager, fp8, divided matrices, a pipeline: none fitted to
SOME = ("ibm", "trainy", "nemotron-4", "llama-3")
FEW = ROWS[:225:32]  # always; the others are slow
FEW += [next(row for row in ROWS if row.source == source) for source in SOME]
PARAMETERS = {  # as published; the table of positions has a row for each token of a window
    "mpt-7b": 6_658_859_008,
    "mpt-13b": 12_853_954_560,
    "mpt-30b": 29_975_214_080,
    "mpt-70b": 64_862_437_376,
}
FITS = [
    row
    for row in ROWS
    if row.model in PARAMETERS and row.length == 2048 and row.machine in ("h100", "a100")
]
SLOW = pytest.mark.slow


def test_each_row_names_its_source_at_a_commit():
    assert {row.source for row in ROWS} == {name.partition(",")[0] for name in SOURCES}
    places = [place.split() for place in SOURCES.values()]
    assert all(place[0] == "arXiv" or len(place[1]) == 40 for place in places)
    assert len({replace(row, speed=0.0, fitted=False) for row in ROWS}) >= len(ROWS) - 7


@pytest.mark.parametrize("row", FEW, ids=lambda row: row.name)
def test_a_published_speed_is_predicted(row):
    assert abs(row.error) < 0.15


@SLOW  # each of 370 jobs is planned
def test_published_speeds_are_predicted():
    groups = groups_of(ROWS)
    lines = [groups.pop(name) for name in [*groups][-8:]]
    fitted, others, fp8, _, pipelines, rings, held_out, _ = lines
    assert sum(map(len, groups.values())) == len(ROWS) == 370
    assert [len(rows) for rows in lines[:-1]] == [102, 80, 50, 57, 29, 18, 268]
    assert not {row.name for row in fitted} & {row.name for row in (*pipelines, *rings)}
    for rows, error, within, most in (
        (fitted, 0.03, 0.94, 0.62),
        (held_out, 0.04, 0.84, 0.46),
        (others, 0.12, 0.55, 0.46),
        (fp8, 0.09, 0.55, 0.37),
        (pipelines, 0.2, 0.3, 0.46),
        (rings, 0.22, 0.3, 0.37),
    ):
        table = summary(rows)
        assert table["median"] < error
        assert table["within 15 %"] > within
        assert table["max"] < most


def test_states_that_few_ranks_divide_stay_near():
    gathered = Collective("weights", "all_gather", 800, 64)
    assert near(gathered, 0) == near(gathered, 64) == [gathered]
    assert near(gathered, 8) == [replace(gathered, ranks=8)]
    scattered = replace(gathered, kind="reduce_scatter")
    inside, between = near(scattered, 8)  # a part each, summed with those of other nodes
    assert inside == replace(scattered, ranks=8)
    assert between == replace(scattered, kind="all_reduce", payload=100, ranks=8, stride=8)


@pytest.mark.parametrize(
    "row", [FITS[0], *(pytest.param(row, marks=SLOW) for row in FITS[1:])], ids=lambda row: row.name
)
def test_a_job_that_was_trained_fits(row):
    plan = Plan(compose(PlanJob, row.words()))
    assert plan.parameters["total"] == PARAMETERS[row.model]
    assert plan.problems == []


def test_the_table_of_answers_has_what_a_plan_says():
    head, _, row = plan_table.table(["llama-1b"], [8]).splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    words = ["recipe=llama-1b", "plan.gpus=8", f"engine={cells['best division']}"]
    words += [f"train.micro_batch={cells['micro-batch']}"]
    chosen = Plan(compose(PlanJob, words)).chosen
    assert cells["MFU"] == f"{chosen.step.mfu:.1%}".replace("%", " %")
    assert cells["GiB a GPU"] == f"{chosen.memory.total / 2**30:,.0f}"
    assert cells["tokens/s a GPU"] == f"{chosen.step.tokens_per_second / 8:,.0f}"
    assert cells["published MFU |"] == "41.7 % |"


@SLOW  # the best divisions on four clusters
@pytest.mark.parametrize("recipe", plan_table.RECIPES)
def test_the_readme_has_the_answers_for(recipe):
    text = (Path(__file__).parents[2] / "trainer/plan/README.md").read_text()
    for row in plan_table.table([recipe]).splitlines():
        assert row in text, "put what python tests/benchmarks/plan_table.py prints there"


@SLOW
def test_the_readme_has_the_table_of_errors():
    text = (Path(__file__).parents[2] / "trainer/plan/README.md").read_text()
    assert plan_table.errors() in text, "put what it prints with the word published there"
