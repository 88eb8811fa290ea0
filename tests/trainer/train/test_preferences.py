"""What training makes of preferences: the loss of a batch is plain DPO, scores are the means of it,
and the reference is computed whole or not at all."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.data.dataset import Sources
from forescale.data.objective import IGNORED
from forescale.data.objectives.responses import Preferences
from forescale.data.stream import validation_windows
from forescale.ground.errors import UserError
from forescale.models import ModelConfig, Transformer
from forescale.run.directory import Run
from forescale.run.references import read_references
from forescale.train import preferences
from forescale.train.preferences import (
    Comparison,
    Reference,
    evaluate_preferences,
    pooled_preferences,
)
from tests.preferences import make_preferences
from tests.preferences import preferences as some_preferences
from tests.trainer.data.objectives.test_preferences import bins_of
from tests.trainer.plain_engine import World

COLUMNS, BETA = 64, 0.3
OBJECTIVE = Preferences(COLUMNS, BETA)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_preferences(tmp_path_factory.mktemp("preferences"))


@pytest.fixture(scope="module")
def models(dataset):
    sizes = ModelConfig(num_layers=1, width=32, num_heads=2, mlp_width=64)
    torch.manual_seed(0)
    return [Transformer(sizes.resolved(dataset.vocab_size, COLUMNS)) for _ in range(2)]


def windows(dataset, references=None, micro=5):
    return validation_windows(
        dataset.split("train"),
        OBJECTIVE.window_length,
        micro,
        objective=OBJECTIVE,
        bins=bins_of(dataset),
        references=references,
    )


@torch.no_grad()
def log_probabilities(model, micro) -> torch.Tensor:
    """Of each row's response, (2B,), by the logits of the whole row."""
    logits = model(micro.tokens).log_softmax(-1)
    real = micro.targets != IGNORED
    return (logits.gather(-1, (micro.targets * real)[..., None])[..., 0] * real).sum(1)


def plain_dpo(policy, reference, micro) -> torch.Tensor:
    """The loss of each preference, by equation 7 of Rafailov et al. 2023."""
    ratio = log_probabilities(policy, micro) - log_probabilities(reference, micro)
    return -F.logsigmoid(BETA * (ratio[0::2] - ratio[1::2]))


def known(model, dataset) -> np.ndarray:
    nats = [-log_probabilities(model, m).view(-1, 2) for m in windows(dataset)]
    return torch.cat(nats)[: int(bins_of(dataset).counts.sum())].numpy()


def test_the_loss_of_a_batch_is_plain_dpo(models, dataset):
    policy, reference = models
    micro = next(windows(dataset, known(reference, dataset)))
    nats = policy(micro.tokens, micro.targets)
    losses, penalty, numbers = Comparison(BETA)(nats, 0.0, micro)
    expected = plain_dpo(policy, reference, micro)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    assert float(expected.std()) > 1e-3, "the models differ"
    assert penalty == 0
    assert {len(each) for each in numbers.values()} == {5}
    assert not numbers["rewards/chosen"].requires_grad


def test_a_penalty_counts_as_that_of_one_target_does(models, dataset):
    micro = next(windows(dataset, known(models[1], dataset)))
    nats = models[0](micro.tokens, micro.targets)
    targets = int((micro.targets != IGNORED).sum())
    _, penalty, _ = Comparison(BETA)(nats, torch.tensor(3.0 * targets), micro)
    assert float(penalty) == pytest.approx(3.0 * 5)


def test_a_score_is_the_mean_of_all_preferences(models, dataset):
    policy, reference = models
    micros = list(windows(dataset, known(reference, dataset)))
    score = evaluate_preferences(lambda m: policy(m.tokens, m.targets).detach(), micros, BETA)
    expected = torch.cat([plain_dpo(policy, reference, m) for m in micros])[:48].double()
    assert score.windows == 48
    assert score.loss == pytest.approx(float(expected.mean()), abs=1e-6)
    assert score.loss_stderr == pytest.approx(float(expected.std()) / math.sqrt(48), abs=1e-6)
    assert score.accuracy == pytest.approx(float((expected < math.log(2)).double().mean()))
    both = pooled_preferences([score, score])
    assert (both.loss, both.windows) == (pytest.approx(score.loss), 96)
    assert both.loss_stderr == pytest.approx(score.loss_stderr / math.sqrt(2))


class Stop(Exception):
    pass


@pytest.fixture
def reference(models, dataset, tmp_path, monkeypatch):
    """Of a run without a checkpoint, whose origin's weights are those of a model here."""
    words = [f"run.root={tmp_path}", "run.name=run", f"data.path={dataset.path}"]
    words += ["run.from.run=origin", "run.from.load=weights", "objective=preferences"]
    words += ["train.steps=1", "train.sequence_length=64", f"data.cache={tmp_path}"]
    words += ["train.global_batch=4", "train.micro_batch=4"]
    start = SimpleNamespace(path=tmp_path, position=SimpleNamespace(step=7))
    (tmp_path / "files.json").write_text("{}")
    monkeypatch.setattr(preferences.choice, "at_step", lambda *arguments: start)
    monkeypatch.setattr(preferences.writer, "load", lambda *arguments, **options: None)
    monkeypatch.setattr(Run, "existing", lambda *arguments: None)
    with torch.no_grad():
        engine = SimpleNamespace(
            world=World(), losses=lambda m: models[1](m.tokens, m.targets).detach()
        )
    run = Run(tmp_path / "run")
    run.path.mkdir()
    job, sources = compose(TrainJob, words), Sources({"data": dataset})
    return Reference(run, job, sources, engine, lambda: False, lambda at: None)


def find(reference, stops=lambda: False, mark=lambda at: None):
    reference.stops, reference.mark = stops, mark
    return reference.find()


def test_the_reference_is_computed_once_and_kept(reference, models, dataset):
    references = find(reference)
    np.testing.assert_allclose(
        references.values["train"]["data"], known(models[1], dataset), rtol=1e-5
    )
    assert references.values["validation"]["data"].shape == (12, 2)
    stored = read_references(reference.run)
    assert np.array_equal(stored.values["train"]["data"], references.values["train"]["data"])
    reference.engine.losses = lambda micro: pytest.fail("computed again")
    find(reference)


def test_of_other_weights_it_is_computed_again(reference, tmp_path):
    first = find(reference)
    (tmp_path / "files.json").write_text("[]")  # the origin's checkpoint was replaced
    reference.engine.losses = lambda micro: torch.zeros(len(micro.tokens))
    assert not find(reference).values["train"]["data"].any()
    assert first.values["train"]["data"].any()


def test_stopped_or_killed_in_between_it_leaves_nothing(reference):
    def killed(at):
        raise Stop

    with pytest.raises(Stop):
        find(reference, mark=killed)
    assert find(reference, stops=lambda: True) is None
    assert [*reference.run.path.iterdir()] == []
    assert find(reference) is not None


def test_a_damaged_file_and_one_that_is_gone_are_sentences(reference, monkeypatch):
    find(reference)
    path = reference.run.references
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"columns": 64', b'"columns": 65'))
    with pytest.raises(UserError, match="was changed since it was written"):
        find(reference)
    path.unlink()
    reference.job.run.origin.load = "everything"
    with pytest.raises(UserError, match=r"references\.json: no such file; .*copy that of origin"):
        find(reference)


def test_references_of_other_rows_or_data_are_refused(reference, dataset, tmp_path):
    find(reference)
    reference.job.run.origin.load = "everything"
    reference.job.train.sequence_length = 128
    with pytest.raises(UserError, match=r"is of rows of 64 columns, and train\.sequence_length is"):
        find(reference)
    reference.job.train.sequence_length = 64
    reference.sources = Sources({"sums": dataset})
    with pytest.raises(UserError, match=r"sources data, and this job names the same sums"):
        find(reference)
    reference.sources = Sources({"data": make_preferences(tmp_path / "other", some_preferences(6))})
    with pytest.raises(UserError, match="is of other data than"):
        find(reference)
