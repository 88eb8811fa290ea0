"""`forescale eval`: score a trained model on datasets, beside compressors, or on tasks."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

from forescale.config.abilities import QUESTIONS, SHOTS, TASKS
from forescale.config.compose import parse
from forescale.config.eval import EvalJob
from forescale.config.sections.objective import PreferencesConfig
from forescale.config.train import TrainJob
from forescale.data.dataset import Dataset
from forescale.data.prepare.sample import bits_per_byte
from forescale.ground.console import plus_minus, progress_display
from forescale.ground.document import is_json, tell_line
from forescale.ground.errors import DONE, UserError
from forescale.inference.view import best_device, open_view
from forescale.run.feed import objective_of

if TYPE_CHECKING:
    from torch import nn

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
    job = parse(EvalJob, arguments)
    scores = _Scores(job)
    if job.abilities:
        scores.abilities()
    elif job.tasks:
        scores.tasks()
    else:
        scores.losses()
    return DONE


class _Scores:
    """Measures a checkpoint by the keys of a job, and prints the scores as text or as JSON."""

    def __init__(self, job: EvalJob):
        self.job, self.view = job, open_view(job.target or "", job.run.root)
        self.checkpoint = self.view.checkpoint(job.step)
        self.trained = self.view.config.train.sequence_length
        self.length = job.sequence_length or self.trained

    def print_json(self, facts: dict[str, Any]) -> None:
        """Print a score as one line of JSON; trainer/inference/README.md has the keys."""
        position = self.checkpoint.position
        where = {"run": self.view.name, "step": position.step, "tokens": position.tokens}
        tell_line(where | facts)

    def model(self) -> "nn.Module":
        """Return the model, for sequences of this length."""
        from forescale.inference.scoring import at_length

        model = self.view.load(self.checkpoint, self.job.trust)
        return at_length(model, self.length, self.trained, self.job.rope_scaling)

    def losses(self) -> None:
        """Print the loss on each dataset, by position too if a length is set, and the details."""
        from forescale.inference.details import expect_continuing, induction, induction_text
        from forescale.inference.scoring import datasets_of, score_of

        job, view = self.job, self.view
        config, objective = view.config, view.config.objective
        if job.details:
            expect_continuing(config)
        datasets = datasets_of(view, job.data)
        are_fixed = getattr(config.model, "encoder_layers", 0) or objective.source_kind
        is_typed = job.sequence_length is not None
        if (self.length != self.trained and are_fixed) or (
            is_typed and objective.whole and not are_fixed
        ):
            problem = f"rows of {objective.kind} have the length of the training"
            raise UserError("sequence_length", problem, "leave it out")
        model = self.model().to(best_device())
        scored = replace(config, train=replace(config.train, sequence_length=self.length))
        for dataset in datasets.values():
            with progress_display() as progress:
                score, left_out = score_of(view, scored, model, dataset, job, progress)
            if is_json():
                facts = {"dataset": dataset.where, "split": job.split, **score.row()}
                if objective.rows == 1:
                    facts["perplexity"] = cast("Score", score).perplexity
                self.print_json({**facts, "corpus_hash": dataset.corpus_hash})
            else:
                self.print_score(dataset, score)
                if left_out:
                    print(f"\nNote: {left_out}.")
            if is_typed:
                self.positions(scored, model, dataset)
            if job.details:
                self.details(scored, model, dataset)
        if job.details:
            of_data = view.identity["dataset"]
            copied = induction(model, of_data["vocab_size"], of_data["end_of_text"], self.length)
            if is_json():
                self.print_json({"of": "induction", **asdict(copied)})
            else:
                print(induction_text(copied))

    def print_score(self, dataset: Dataset, score: "Score | PreferenceScore") -> None:
        """Print the score on a dataset, beside compressors if they compare."""
        job, objective, position = self.job, self.view.config.objective, self.checkpoint.position
        part = "" if job.windows is None else f", {score.windows:,} windows spread over it"
        known = self.view.identity["dataset"]["sources"].values()
        note = "; the run was trained on this split" if known and job.split == "train" else ""
        if known and dataset.identity not in [source["identity"] for source in known]:
            note = "; the run was trained on other data"
        print(
            f"Run {self.view.name}, step {position.step:,} ({position.tokens:,} "
            f"{objective.counted}), in fp32, on the {job.split} split of {dataset.where}{part}\n"
            f"(corpus hash {dataset.corpus_hash[:16]}{note}):\n"
        )
        if isinstance(objective, PreferencesConfig):
            return _print_preferences(cast("PreferenceScore", score), objective.beta)
        score = cast("Score", score)
        is_other, targets = not self.view.config.continues_text, objective.targets
        # What a decoder writes of spans has a probability of its own; masked tokens together don't.
        name = "pseudo-perplexity" if objective.sees_both_sides else "perplexity"
        wide = max(len("bits per byte"), len(name), len(targets))
        of = f" of {targets}; not comparable with a causal model's" if is_other else ""
        print(
            f"  {'bits per byte':<{wide}}  {score.bits_per_byte:.4f}{of}\n"
            f"  {'loss':<{wide}}  {score.loss:.4f}{plus_minus(score.loss_stderr)} nats a token\n"
            f"  {name:<{wide}}  {score.perplexity:.2f} (only comparable under this tokenizer)\n"
            f"  {targets:<{wide}}  {score.targets:,}\n"
            f"  {'bytes':<{wide}}  {score.bytes:,}"
        )
        others = bits_per_byte(dataset.manifest) if job.split == "validation" else {}
        if is_other or not others:
            return
        print("\nCompressors over the whole split, in bits per byte:\n")
        widest = max(map(len, others))
        for name, bits in others.items():
            ratio = ""
            if job.windows is None:  # over the same bytes
                ratio = f"   the model needs {score.bits_per_byte / bits:.3f} times this"
            print(f"  {name:<{widest}}  {bits:.4f}{ratio}")

    def positions(self, scored: TrainJob, model: "nn.Module", dataset: Dataset) -> None:
        """Print the loss by position. scored: the run's job with the windows' length."""
        from forescale.inference.scoring import edges_of, loss_by_position

        job, length = self.job, self.length
        if not scored.continues_text:
            if not is_json():
                print("\nNo loss by position: a target here is predicted from both sides.")
            return
        with progress_display() as progress:
            buckets = loss_by_position(
                model,
                dataset,
                job.split,
                sequence_length=length,
                edges=edges_of(length, self.trained),
                windows=job.windows,
                documents=scored.data.document_mask,
                objective=objective_of(scored, dataset.vocab_size, True),
                progress=progress,
            )
        if is_json():
            for bucket in buckets:
                self.print_json({"dataset": dataset.where, **asdict(bucket)})
            return
        how = ""
        if job.rope_scaling:
            times = f"{length / self.trained:g} times"
            how = f", rotary positions scaled by {job.rope_scaling} to {times}"
        print(
            f"\nLoss by position, the number of earlier tokens that the model sees, in windows of "
            f"{length:,}\n(trained in windows of {self.trained:,}{how}):\n"
        )
        print(f"  {'positions':>17}  {'nats a token':<17}  tokens")
        for b in buckets:
            loss = f"{b.loss:.4f}{plus_minus(b.loss_stderr)}" if b.targets else "none"
            print(f"  {f'{b.first:,} to {b.last:,}':>17}  {loss:<17}  {b.targets:,}")

    def details(self, scored: TrainJob, model: "nn.Module", dataset: Dataset) -> None:
        """Print the details of a score. scored: the run's job with the windows' length."""
        from forescale.inference.details import details_text, measure

        with progress_display() as progress:
            details = measure(scored, model, dataset, self.job.split, self.job.windows, progress)
        if not is_json():
            return print(details_text(details))
        for by, parts in details.parts.items():
            for part in parts:
                self.print_json({"dataset": dataset.where, "of": by, **asdict(part)})
        context = asdict(details.in_context)
        self.print_json({"dataset": dataset.where, "of": "in_context", **context})

    def tasks(self) -> None:
        """Print the scores on tasks of lm_eval."""
        from forescale.inference.harness.language_model import LanguageModel
        from forescale.inference.harness.scores import (
            as_facts,
            lm_eval_version,
            new_file,
            scores_of,
            table,
            write_answers,
        )
        from forescale.inference.harness.tasks import loaded_tasks, quiet

        job, step = self.job, self.checkpoint.position.step
        with quiet():
            tasks = loaded_tasks(job.tasks)
        answers = None if job.answers is None else new_file(job.answers)
        model = self.model()
        with progress_display() as progress:
            language_model = LanguageModel(
                self.view, model, batch=job.micro_batch, length=self.length, progress=progress
            )
            scores = list(scores_of(language_model, tasks, job.shots, job.questions, job.chat))
        if is_json():
            for score in scores:
                self.print_json({**as_facts(score), "chat": job.chat})
        else:
            print(
                f"Run {self.view.name}, step {step:,}, in fp32, tasks of lm_eval "
                f"{lm_eval_version()}\n(± standard error; in brackets 90 % intervals of shares):\n"
            )
            print(table(scores))
        if answers is not None:  # last: a full disk takes no scores away
            write_answers(answers, scores)

    def abilities(self) -> None:
        """Print the accuracy on each task, a line each, by the number of examples."""
        from forescale.inference.scoring import abilities_of

        job, model = self.job, self.view.load(self.checkpoint, self.job.trust)
        with progress_display() as progress:
            results = abilities_of(self.view, model, job, progress)
        measured = [one for row in results.values() for one in row]
        if is_json():
            for one in filter(None, measured):
                low, high = one.interval
                self.print_json({**asdict(one), "low": low, "high": high})
            return
        questions, shots = job.questions or QUESTIONS, job.shots or SHOTS
        print(
            f"Run {self.view.name}, step {self.checkpoint.position.step:,}: right answers of "
            f"{questions:,}, in percent, with 90 % intervals\n"
            "(nats: the mean loss of an answer after most examples).\n"
        )
        wide = max(map(len, results))
        counts = "".join(f"{count:>16}" for count in shots)
        print(f"  {'examples':<{wide}}{counts}    nats  by chance")
        for name, row in results.items():
            cells, nats = "", f"{'':>8}"
            for accuracy in row:
                cell = "-"
                if accuracy is not None:
                    low, high = accuracy.interval
                    cell = f"{100 * accuracy.share:.0f} ({100 * low:.0f} to {100 * high:.0f})"
                    nats = f"{accuracy.nats:>8.3f}"
                cells += f"{cell:>16}"
            print(f"  {name:<{wide}}{cells}{nats}  {100 * TASKS[name].chance:9.3g}")
        if None in measured:
            print(f"\n-: so many examples don't fit into {self.trained:,} tokens.")


def _print_preferences(score: "PreferenceScore", beta: float) -> None:
    from forescale.run.abilities import interval_of

    numbers, n = score.numbers, score.windows
    low, high = interval_of(round(score.accuracy * n), n)
    print(
        f"  accuracy     {score.accuracy:.4f} (90 % interval {low:.4f} to {high:.4f}): the chosen "
        "response has the higher reward\n"
        f"  margin       {numbers['rewards/margins']:.4f}: chosen {numbers['rewards/chosen']:.4f}, "
        f"rejected {numbers['rewards/rejected']:.4f}, at beta {beta:g}\n"
        f"  loss         {score.loss:.4f}{plus_minus(score.loss_stderr)} "
        "(0.6931 for the reference)\n"
        f"  preferences  {n:,}"
    )
