"""The abilities of a run's checkpoint: its accuracy on small tasks."""

from torch import Tensor, nn

from forescale.config.eval import ScoreJob
from forescale.console import Progress, silent
from forescale.data.tokenizer import text_ids
from forescale.errors import UserError
from forescale.inference.view import RunView, best_device
from forescale.run.abilities import Accuracy, questions_of
from forescale.train.abilities import accuracies, judged


def abilities_of(
    view: RunView, model: nn.Module, job: ScoreJob, progress: Progress = silent
) -> dict[str, list[Accuracy | None]]:
    """Return for each of job.abilities its accuracy at each number of examples (job.shots); None
    where the examples don't fit the run's windows.

    Raises UserError for a model that doesn't continue text.
    """
    config = view.config
    if not config.continues_text:
        problem = f"was trained with objective={config.objective.kind}, and continues no text"
        raise UserError("abilities", problem, "leave it out, or name a run that continues text")
    device = best_device()
    model = model.to(device)

    def judge(tokens_BL: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
        return judged(model(tokens_BL.to(device)), targets_BL)

    questions = questions_of(
        lambda text: text_ids(view.tokenizer, text),
        view.identity["dataset"]["end_of_text"],
        job.abilities,
        job.shots,
        job.questions,
    )
    results: dict[str, list[Accuracy | None]] = {name: [] for name in job.abilities}
    total, done = sum(len(each.rows) for each in questions), 0
    for each in questions:
        if each.longest > config.train.sequence_length:
            results[each.task].append(None)
        else:
            results[each.task] += accuracies(judge, [each], rows=job.micro_batch)
        done += len(each.rows)
        progress("abilities", done, total, "questions")
    return results
