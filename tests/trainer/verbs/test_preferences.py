"""`finetune` with preferences: the run that it makes, and one that is trained, scored, gone on with
and branched, on one rank in this process."""

import json
import math

import pytest

from forescale import open_run
from forescale.config.sections.objective import ResponsesConfig
from forescale.run.finetune import first_config
from forescale.run.references import read_references
from tests.preferences import preferences
from tests.questions import rows, write_rows


@pytest.fixture
def lines():
    return preferences()


def test_the_lines_say_that_they_are_preferences_and_the_run_has_their_defaults(
    make, origin, tmp_path
):
    assert "with 57 examples; 3 are held out" in make.prints()
    config, old = open_run(tmp_path / "small-sums").config, open_run(origin.path).config
    assert (config.objective.kind, config.objective.beta) == ("preferences", 0.1)
    assert config.total_steps == math.ceil(57 / old.train.global_batch), "one epoch"
    rate = old.optimizer.learning_rate / 15 / 40
    assert config.optimizer.learning_rate == pytest.approx(rate, rel=0.01)


def test_after_a_fine_tuning_the_rate_is_a_fortieth_of_its_own(origin):
    config = open_run(origin.path).config
    config.objective = ResponsesConfig()
    rate = config.optimizer.learning_rate
    rows = first_config(config, is_import=False, are_preferences=True)
    assert rows["optimizer"]["learning_rate"] == pytest.approx(rate / 40, rel=0.01)
    config.lora.rank = 8
    rows = first_config(config, is_import=False, are_preferences=True)
    assert rows["optimizer"]["learning_rate"] == pytest.approx(rate / 400, rel=0.01), "adapters'"
    config.lora.rank = 0
    rows = first_config(config, is_import=True, are_preferences=True)
    assert rows["optimizer"]["learning_rate"] == 5e-7
    assert rows["train"]["global_batch"] == 64


def test_two_rows_a_preference_are_planned(make, tmp_path, forescale):
    make("run.name=planned", "train.micro_batch=2", "train.global_batch=4")
    out = forescale.prints("plan", tmp_path / "planned")
    assert "15 steps of 1,024 columns: 4 windows of 2 x 128, 2 x 2 per rank" in out
    assert "the reference reads before the first step 60 windows" in out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["objective=responses"], "60 that are not {"),
        (["objective.beta=0"], "objective.beta"),
        (["model.mtp_layers=1"], "would learn the rejected responses"),
        (["engine.sequence_parallel=2"], "needs whole responses"),
        (["run.from.load=everything"], "run.from.load: a fine-tuning begins at step 0"),
    ],
)
def test_what_can_not_be_is_a_sentence(make, words, problem):
    assert problem in make.refuses(*words)


def test_a_mixed_file_is_a_sentence(make, tmp_path):
    mixed = write_rows(tmp_path / "mixed.jsonl", [*preferences(2), *rows(2)])
    err = make.refuses(f"data={mixed}", "run.name=mixed")
    assert "mixed.jsonl: 2 lines can't be used: 2 that are not" in err
    assert "(line 3, 4)" in err


def test_a_dataset_of_examples_is_no_dataset_of_preferences(make, tmp_path, forescale, origin):
    examples = write_rows(tmp_path / "examples.jsonl", rows())
    assert make(f"data={examples}", "run.name=examples")[0] == 0
    path = open_run(tmp_path / "examples").config.data.path
    words = (f"run.from.run={origin.path}", "run.from.load=weights", f"data.path={path}")
    options = (f"run.root={tmp_path}", f"data.cache={tmp_path}", "objective=preferences")
    err = forescale.refuses("plan", "train", *words, *options)
    assert "holds examples, which objective=preferences doesn't read" in err


def test_without_a_run_to_go_on_from_there_is_no_reference(forescale, tmp_path):
    err = forescale.refuses("train", "objective=preferences", f"run.root={tmp_path}")
    assert "run.from.run: preferences are learned beside a reference" in err


@pytest.mark.distributed
def test_a_run_begins_with_log_2_and_learns_to_prefer(make, tmp_path, forescale):
    typed = ("run.name=learned", "train.global_batch=19", "train.micro_batch=19", "epochs=8")
    typed += ("optimizer.learning_rate=0.003", "optimizer.adam_learning_rate=0.003")
    typed += ("train.compile=off", "precision=fp32", "held_out=0", "schedule.warmup=0")
    assert make(*typed)[0] == 0
    run = open_run(tmp_path / "learned")
    assert forescale("train", run.path)[0] == 0
    rows = [json.loads(x) for x in (run.path / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [row for row in rows if row["kind"] == "train"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["extra.rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert last["extra.rewards/accuracies"] == 1
    assert last["loss"] < 0.5
    references = read_references(run.run)
    assert references.values["train"]["data"].shape == (60, 2)
    (score,) = run.evaluate(split="train").values()
    assert score.accuracy == 1
    assert score.loss < 0.5
    out = forescale.prints("eval", run.path, "split=train")
    assert "accuracy     1.0000 (90 % interval 0.95" in out
    assert "preferences  60" in out
