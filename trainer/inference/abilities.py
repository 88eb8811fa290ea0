"""The abilities of a run's checkpoint: its accuracy on small tasks."""

from torch import Tensor, nn

from forescale.abilities.few_shot import Accuracy, accuracies, judged
from forescale.abilities.questions import questions_of
from forescale.abilities.tasks import QUESTIONS, SHOTS
from forescale.config.eval import ScoreJob
from forescale.console import Progress, silent
from forescale.data.tokenizer import text_ids
from forescale.errors import UserError
from forescale.inference.view import RunView, best_device


def abilities_of(
    view: RunView, model: nn.Module, job: ScoreJob, progress: Progress = silent
) -> dict[str, list[Accuracy | None]]:
    """Return for each of job.abilities its accuracy at each of job.shots (if there are none, of
    SHOTS); None where the examples don't fit the run's windows.

    Raises UserError for a model that doesn't continue text.
    """
    config = view.config
    if not config.continues_text:
        problem = f"was trained with objective.kind={config.objective.kind}, and continues no text"
        raise UserError("abilities", problem, "leave it out, or name a run that continues text")
    device = best_device()
    model = model.to(device)

    def judge(tokens_BL: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
        return judged(model(tokens_BL.to(device)), targets_BL)

    found: dict[str, list[Accuracy | None]] = {name: [] for name in job.abilities}
    every = questions_of(
        lambda text: text_ids(view.tokenizer, text),
        view.identity["dataset"]["end_of_text"],
        [*found],
        job.shots or SHOTS,
        questions=job.questions or QUESTIONS,
    )
    total, done = sum(len(each.rows) for each in every), 0
    for each in every:
        if each.longest > config.train.sequence_length:
            found[each.task].append(None)
        else:
            found[each.task] += accuracies(judge, [each], rows=job.micro_batch)
        done += len(each.rows)
        progress("abilities", done, total, "questions")
    return found
