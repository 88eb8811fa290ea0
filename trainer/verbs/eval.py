"""`forescale eval`: score a trained model on datasets, beside compressors, or on tasks."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

from forescale.checkpoint.reader import Checkpoint, Position
from forescale.config.abilities import QUESTIONS, SHOTS, TASKS
from forescale.config.compose import compose, overrides_of
from forescale.config.eval import EvalJob
from forescale.config.sections.objective import PreferencesConfig
from forescale.config.train import TrainJob
from forescale.data.dataset import Dataset
from forescale.data.prepare.sample import bits_per_byte
from forescale.ground.console import progress_display
from forescale.ground.errors import DONE, UserError
from forescale.inference.view import RunView, best_device, open_view
from forescale.run.feed import objective_of
from forescale.run.rows import to_json

if TYPE_CHECKING:
    from torch import nn

    from forescale.inference.scoring import Bucket
    from forescale.run.abilities import Accuracy
    from forescale.train.evaluate import Score
    from forescale.train.preferences import PreferenceScore


JOB = EvalJob
EXAMPLES = (
    "eval first",
    "eval first data.path=/data/books",
    "eval first --details",
    "eval first sequence_length=1024 rope_scaling=yarn",
    "eval first abilities=[copy,recall] shots=[0,4,16]",
    "eval first tasks=[mine.yaml,arc_easy] shots=[0,5] --json",
)


def main(arguments: list[str]) -> int:
    """Print the scores of a checkpoint on each dataset."""
    job = compose(EvalJob, overrides_of(EvalJob, arguments))
    view = open_view(job.target or "", job.run.root)
    checkpoint = view.checkpoint(job.step)
    if job.abilities:
        return _abilities(job, view, checkpoint)
    if job.tasks:
        return _tasks(job, view, checkpoint)
    return _losses(job, view, checkpoint)


def _losses(job: EvalJob, view: RunView, checkpoint: Checkpoint) -> int:
    """Print the loss on each dataset, by position too if a length is set, and the details."""
    from forescale.inference.details import expect_continuing, induction, induction_text
    from forescale.inference.scoring import at_length, datasets_of, references_of, score_of

    if job.details:
        expect_continuing(view.config)
    datasets = datasets_of(view, job.data)
    trained = view.config.train.sequence_length
    length = _length(job, view.config)
    model = at_length(view.load(checkpoint, job.trust), length, trained, job.rope_scaling)
    model = model.to(best_device())
    scored = replace(view.config, train=replace(view.config.train, sequence_length=length))
    for dataset in datasets.values():
        with progress_display() as progress:
            score, left_out = score_of(
                scored,
                model,
                dataset,
                job.split,
                micro_batch=job.micro_batch,
                windows=job.windows,
                cache=job.data.cache_directory,
                references=references_of(view, dataset, job.split),
                progress=progress,
            )
        if job.json:
            facts = {"dataset": dataset.where, "split": job.split, **score.row()}
            if view.config.objective.rows == 1:
                facts["perplexity"] = cast("Score", score).perplexity
            facts["corpus_hash"] = dataset.corpus_hash
            _print_json(view, checkpoint, facts)
        else:
            _print(job, view, checkpoint.position, dataset, score)
            if left_out:
                print(f"\nNote: {left_out}.")
        if job.sequence_length is not None:
            _positions(job, view, checkpoint, scored, model, dataset)
        if job.details:
            _details(job, view, checkpoint, scored, model, dataset)
    if job.details:
        of_data = view.identity["dataset"]
        copied = induction(model, of_data["vocab_size"], of_data["end_of_text"], length)
        if job.json:
            _print_json(view, checkpoint, {"of": "induction", **asdict(copied)})
        else:
            print(induction_text(copied))
    return DONE


def _length(job: EvalJob, config: TrainJob) -> int:
    """Return the targets of a window. Raises UserError if they can't be chosen."""
    trained = config.train.sequence_length
    length = job.sequence_length or trained
    layers, objective = getattr(config.model, "encoder_layers", 0), config.objective
    are_fixed, is_typed = layers or objective.source_kind, job.sequence_length is not None
    if (length != trained and are_fixed) or (is_typed and objective.whole and not are_fixed):
        problem = f"rows of {config.objective.kind} have the length of the training"
        raise UserError("sequence_length", problem, "leave it out")
    return length


def _positions(
    job: EvalJob,
    view: RunView,
    checkpoint: Checkpoint,
    scored: TrainJob,
    model: "nn.Module",
    dataset: Dataset,
) -> None:
    """Print the loss by position. scored: the run's job with the windows' length."""
    from forescale.inference.scoring import edges_of, loss_by_position

    length, trained = scored.train.sequence_length, view.config.train.sequence_length
    if not scored.continues_text:
        if not job.json:
            print("\nNo loss by position: a target here is predicted from both sides.")
        return
    with progress_display() as progress:
        buckets = loss_by_position(
            model,
            dataset,
            job.split,
            sequence_length=length,
            edges=edges_of(length, trained),
            windows=job.windows,
            documents=scored.data.document_mask,
            objective=objective_of(scored, dataset.vocab_size, True),
            progress=progress,
        )
    if job.json:
        for bucket in buckets:
            _print_json(view, checkpoint, {"dataset": dataset.where, **asdict(bucket)})
    else:
        _print_buckets(buckets, length, trained, job.rope_scaling)


def _details(
    job: EvalJob,
    view: RunView,
    checkpoint: Checkpoint,
    scored: TrainJob,
    model: "nn.Module",
    dataset: Dataset,
) -> None:
    """Print the details of a score. scored: the run's job with the windows' length."""
    from forescale.inference.details import details_text, measure

    with progress_display() as progress:
        details = measure(
            scored,
            model,
            dataset,
            job.split,
            sequence_length=scored.train.sequence_length,
            windows=job.windows,
            progress=progress,
        )
    if not job.json:
        return print(details_text(details))
    for by, parts in details.parts.items():
        for part in parts:
            _print_json(view, checkpoint, {"dataset": dataset.where, "of": by, **asdict(part)})
    facts = {"dataset": dataset.where, "of": "in_context", **asdict(details.in_context)}
    _print_json(view, checkpoint, facts)


def _print_json(view: RunView, checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
    """Print a score as one line of JSON; trainer/inference/README.md has the keys."""
    position = checkpoint.position
    where = {"run": view.name, "step": position.step, "tokens": position.tokens}
    print(to_json(where | facts))


def _tasks(job: EvalJob, view: RunView, checkpoint: Checkpoint) -> int:
    """Print the scores on tasks of lm_eval."""
    from forescale.inference.harness.language_model import LanguageModel
    from forescale.inference.harness.results import as_facts, new_file, table, write_answers
    from forescale.inference.harness.scores import lm_eval_version, scores_of
    from forescale.inference.harness.tasks import loaded_tasks, quiet
    from forescale.inference.scoring import at_length

    with quiet():
        tasks = loaded_tasks(job.tasks)
    answers = None if job.answers is None else new_file(job.answers)
    trained = view.config.train.sequence_length
    length = job.sequence_length or trained
    model = at_length(view.load(checkpoint, job.trust), length, trained, job.rope_scaling)
    with progress_display() as progress:
        language_model = LanguageModel(
            view, model, batch=job.micro_batch, length=length, progress=progress
        )
        scores = list(scores_of(language_model, tasks, job.shots, job.questions, job.chat))
    if job.json:
        for score in scores:
            _print_json(view, checkpoint, {**as_facts(score), "chat": job.chat})
    else:
        print(
            f"Run {view.name}, step {checkpoint.position.step:,}, in fp32, tasks of lm_eval "
            f"{lm_eval_version()}\n(± standard error; in brackets 90 % intervals of shares):\n"
        )
        print(table(scores))
    if answers is not None:  # last: a full disk takes no scores away
        write_answers(answers, scores)
    return DONE


def _abilities(job: EvalJob, view: RunView, checkpoint: Checkpoint) -> int:
    """Print the accuracy on each task, a line each, by the number of examples."""
    from forescale.inference.scoring import abilities_of

    with progress_display() as progress:
        results = abilities_of(view, view.load(checkpoint, job.trust), job, progress)
    if job.json:
        for one in (one for row in results.values() for one in row if one is not None):
            low, high = one.interval
            _print_json(view, checkpoint, {**asdict(one), "low": low, "high": high})
        return DONE
    questions, shots = job.questions or QUESTIONS, job.shots or SHOTS
    print(
        f"Run {view.name}, step {checkpoint.position.step:,}: right answers of {questions:,}, "
        "in percent, with 90 % intervals\n(nats: the mean loss of an answer after most examples).\n"
    )
    wide = max(map(len, results))
    counts = "".join(f"{count:>16}" for count in shots)
    print(f"  {'examples':<{wide}}{counts}    nats  by chance")
    for name, row in results.items():
        cells = "".join(f"{_share(one):>16}" for one in row)
        known = [one for one in row if one is not None]
        nats = f"{known[-1].nats:>8.3f}" if known else f"{'':>8}"
        print(f"  {name:<{wide}}{cells}{nats}  {100 * TASKS[name].chance:9.3g}")
    if any(one is None for row in results.values() for one in row):
        length = view.config.train.sequence_length
        print(f"\n-: so many examples don't fit into {length:,} tokens.")
    return DONE


def _share(one: "Accuracy | None") -> str:
    if one is None:
        return "-"
    low, high = one.interval
    return f"{100 * one.share:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def _print_buckets(buckets: list["Bucket"], length: int, trained: int, scaling: str | None) -> None:
    how = f", rotary positions scaled by {scaling} to {length / trained:g} times" if scaling else ""
    print(
        f"\nLoss by position, the number of earlier tokens that the model sees, in windows of "
        f"{length:,}\n(trained in windows of {trained:,}{how}):\n"
    )
    print(f"  {'positions':>17}  {'nats a token':<17}  tokens")
    for b in buckets:
        loss = f"{b.loss:.4f} ± {b.loss_stderr:.4f}" if b.targets else "none"
        print(f"  {f'{b.first:,} to {b.last:,}':>17}  {loss:<17}  {b.targets:,}")


def _print(
    job: EvalJob,
    view: RunView,
    position: Position,
    dataset: Dataset,
    score: "Score | PreferenceScore",
) -> None:
    part = "" if job.windows is None else f", {score.windows:,} windows spread over it"
    objective = view.config.objective
    head = (
        f"Run {view.name}, step {position.step:,} ({position.tokens:,} {objective.counted}), in "
        f"fp32, on the {job.split} split of {dataset.where}{part}\n"
        f"(corpus hash {dataset.corpus_hash[:16]}{_training_note(view, dataset, job.split)}):\n"
    )
    print(head)
    if isinstance(objective, PreferencesConfig):
        return _print_preferences(cast("PreferenceScore", score), objective.beta)
    score = cast("Score", score)
    is_other, targets = not view.config.continues_text, objective.targets
    # What a decoder writes of spans has a probability of its own; masked tokens have none together.
    name = "pseudo-perplexity" if objective.sees_both_sides else "perplexity"
    wide = max(len("bits per byte"), len(name), len(targets))
    of = f" of {targets}; not comparable with a causal model's" if is_other else ""
    print(
        f"  {'bits per byte':<{wide}}  {score.bits_per_byte:.4f}{of}\n"
        f"  {'loss':<{wide}}  {score.loss:.4f} ± {score.loss_stderr:.4f} nats a token\n"
        f"  {name:<{wide}}  {score.perplexity:.2f} (only comparable under this tokenizer)\n"
        f"  {targets:<{wide}}  {score.targets:,}\n"
        f"  {'bytes':<{wide}}  {score.bytes:,}"
    )
    if is_other:
        return
    if job.split == "validation" and (others := bits_per_byte(dataset.manifest)):
        print("\nCompressors over the whole split, in bits per byte:\n")
        widest = max(map(len, others))
        for name, bits in others.items():
            compared = bits and job.windows is None  # over the same bytes
            ratio = (
                f"   the model needs {score.bits_per_byte / bits:.3f} times this"
                if compared
                else ""
            )
            print(f"  {name:<{widest}}  {bits:.4f}{ratio}")


def _print_preferences(score: "PreferenceScore", beta: float) -> None:
    from forescale.run.abilities import interval_of

    numbers, n = score.numbers, score.windows
    low, high = interval_of(round(score.accuracy * n), n)
    print(
        f"  accuracy     {score.accuracy:.4f} (90 % interval {low:.4f} to {high:.4f}): the chosen "
        "response has the higher reward\n"
        f"  margin       {numbers['rewards/margins']:.4f}: chosen {numbers['rewards/chosen']:.4f}, "
        f"rejected {numbers['rewards/rejected']:.4f}, at beta {beta:g}\n"
        f"  loss         {score.loss:.4f} ± {score.loss_stderr:.4f} (0.6931 for the reference)\n"
        f"  preferences  {n:,}"
    )


def _training_note(view: RunView, dataset: Dataset, split: str) -> str:
    """Return a remark if the run was trained on this split, or not on this dataset."""
    known = view.identity["dataset"]["sources"].values()
    if not known:
        return ""
    if dataset.identity not in [source["identity"] for source in known]:
        return "; the run was trained on other data"
    return "; the run was trained on this split" if split == "train" else ""
