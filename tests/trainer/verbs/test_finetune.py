"""`finetune`: a run that goes on from another's weights; all that it prints before it trains."""

import math
from dataclasses import replace

import pytest

from forescale import open_dataset, open_run
from forescale.models.adapters import num_adapters
from forescale.run.finetune import first_config, smaller_batch
from tests.questions import rows, write_rows
from tests.trainer.small_run import STEPS


def test_the_run_has_the_config_of_its_origin_and_the_defaults_of_fine_tuning(
    make, origin, tmp_path
):
    out = make.prints()
    assert (
        f"Fine-tunes {origin.path}, from its step {STEPS}, with 57 examples; 3 are held out" in out
    )
    config, old = open_run(tmp_path / "small-sums").config, open_run(origin.path).config
    assert config.model == old.model
    assert config.run.origin.load == "weights"
    assert config.optimizer.learning_rate == pytest.approx(
        old.optimizer.learning_rate / 15, rel=0.01
    )
    assert config.total_steps == math.ceil(3 * 57 / old.train.global_batch)
    assert config.steps_of(config.validation.every) == math.ceil(57 / old.train.global_batch)


@pytest.mark.parametrize(
    ("examples", "least", "batch"),
    [(7, 1, 1), (7, 8, 8), (950, 1, 16), (5000, 1, 128), (9**6, 1, 128)],
)
def test_of_few_examples_a_step_has_fewer(origin, examples, least, batch):
    config = open_run(origin.path).config
    config = replace(config, train=replace(config.train, global_batch=128, micro_batch=32))
    smaller = smaller_batch(config, examples, 3.0, least)
    assert smaller.train.global_batch == batch
    assert smaller.train.micro_batch == min(batch, 32)


def test_imported_weights_have_rates_of_their_own(origin):
    """Their config has no rate that they were trained with."""
    config = first_config(open_run(origin.path).config, is_import=True)
    assert config["optimizer"]["kind"] == "adamw"
    assert config["optimizer"]["learning_rate"] == 2e-5
    assert config["train"]["global_batch"] % config["train"]["micro_batch"] == 0


def test_an_average_is_gone_on_from_as_its_run_is(make, origin, tmp_path, forescale):
    """Its rate is known, unlike that of imported weights."""
    assert forescale("average", origin.path, f"run.root={tmp_path}", "run.name=mean")[0] == 0
    out = make.prints("run.name=tuned", start=tmp_path / "mean")
    assert f"Fine-tunes {tmp_path / 'mean'}, from its step 0, with 57 examples" in out
    config, old = open_run(tmp_path / "tuned").config, open_run(origin.path).config
    assert config.optimizer.learning_rate == pytest.approx(
        old.optimizer.learning_rate / 15, rel=0.01
    )


def test_adapters_have_a_rate_and_an_optimizer_of_their_own(make, origin, tmp_path, forescale):
    assert make("lora.rank=4", "run.name=lora")[0] == 0
    config, old = open_run(tmp_path / "lora").config, open_run(origin.path).config.optimizer
    rate = 0.2 * old.learning_rate  # Muon's, of matrices; that of its tables is another
    assert config.optimizer.kind == "adamw"
    assert config.optimizer.weight_decay == 0
    assert config.optimizer.learning_rate == pytest.approx(rate / 1.5, rel=0.01)
    out = forescale.prints("plan", tmp_path / "lora")
    inside = num_adapters(config.model, 4, [])
    assert f"trained adapters {inside / 1000:.4g}" in out


def test_what_is_typed_counts_and_the_same_command_finds_the_run(make, tmp_path):
    typed = ("run.name=mine", "epochs=2", "optimizer.learning_rate=0.5", "train.global_batch=19")
    typed += ("train.micro_batch=19", "held_out=0", "faults=[kill@5:rank0]")
    assert make(*typed)[0] == 0
    config = open_run(tmp_path / "mine").config
    assert (config.total_steps, config.optimizer.learning_rate) == (7, 0.5)
    assert "Goes on fine-tuning" in make.prints(*typed)
    assert open_run(tmp_path / "mine").config == config


def test_it_begins_with_a_checkpoint_that_is_named(make, origin, tmp_path):
    make.prints("run.name=early", start=origin.checkpoint_path(4))
    assert open_run(tmp_path / "early").config.run.origin.step == 4


def test_the_dataset_has_the_tokenizer_and_plan_reads_it(make, origin, tmp_path, forescale):
    make()
    run = open_run(tmp_path / "small-sums")
    assert run.path.joinpath("tokenizer.json").read_bytes() == origin.tokenizer.read_bytes()
    dataset = open_dataset(run.config.data.path)
    assert dataset.split("train").num_documents == 57
    assert "tokens read, 3.0" in forescale.prints("plan", run.path)


def test_bad_lines_are_a_sentence_and_nothing_is_made(make, tmp_path, forescale, origin):
    bad = write_rows(tmp_path / "bad.jsonl", [*rows(3), "{"])
    err = make.refuses(f"data={bad}", "run.name=bad")
    assert "bad.jsonl: 1 line can't be used: 1 that are no valid JSON (line 4)" in err
    assert not (tmp_path / "bad").exists()
    out = make.prints(f"data={bad}", "run.name=bad", "unusable=skip")
    assert "Note: 1 line can't be used: 1 that are no valid JSON (line 4); they are left out" in out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["data=none.jsonl"], "none.jsonl: no such file"),
        (["run.from.load=everything"], "run.from.load: a fine-tuning begins at step 0"),
        (["train.first_batch=1", "train.batch_ramp=1"], "first_batch: a fine-tuning counts epochs"),
        (["template=none.jinja"], "none.jinja: no such file"),
        (["faults=[kill@5000:rank0]"], "comes after the run's last step, "),
        (["data.document_mask=true"], "data.document_mask: a row of responses has no documents"),
        (["data.packing=best_fit"], "data.packing: examples side by side in a row would see each"),
        (
            ["data.packing=best_fit", "data.document_mask=true", "data.damaged=substitute"],
            "data.damaged: of packed examples hardly two rows",
        ),
        (["objective=next_token"], "objective: a fine-tuning learns responses or preferences"),
        (["model.causal=false"], "model.causal: "),
        (
            ["lora.rank=4", "lora.targets=[key,keys]"],
            "lora.targets: no matrix of the model is 'keys'",
        ),
        (["lora.rank=4", "optimizer=muon"], "optimizer.kind: updates whole matrices"),
        (["lora.rank=4", "precision.fp8=rowwise"], "precision.fp8: "),
        (["lora.rank=1000000000"], "lora.rank: no matrix with an adapter has a rank above "),
    ],
)
def test_what_can_not_be_is_a_sentence(make, words, problem):
    assert problem in make.refuses(*words)


def test_a_run_that_is_none_is_a_sentence(make, forescale):
    assert make(start="nobody")[0] == 2
    assert "write forescale finetune FROM data=FILE.jsonl" in forescale.refuses("finetune")
