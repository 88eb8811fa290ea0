"""The abilities of a run's checkpoint: its accuracy on small tasks."""

from torch import Tensor, nn

from forescale.abilities.few_shot import Accuracy, accuracies
from forescale.abilities.tasks import QUESTIONS, SHOTS
from forescale.config.eval import ScoreJob
from forescale.errors import UserError
from forescale.inference.sampling import text_ids
from forescale.inference.view import RunView, best_device
from forescale.progress import Progress, silent


def abilities_of(
    view: RunView, model: nn.Module, job: ScoreJob, progress: Progress = silent
) -> dict[str, list[Accuracy | None]]:
    """Return for each of job.abilities its accuracy at each of job.shots (if there are none, of
    SHOTS); None where the examples don't fit the run's windows.

    Raises UserError for a model that doesn't continue text.
    """
    config = view.config
    if not config.continues_text:
        what = f"was trained with objective.kind={config.objective.kind}, and continues no text"
        raise UserError("abilities", what, "leave it out, or name a run that continues text")
    device = best_device()
    model = model.to(device)

    def logits(tokens_BL: Tensor) -> Tensor:
        found: Tensor = model(tokens_BL)
        return found

    found: dict[str, list[Accuracy | None]] = {name: [] for name in job.abilities}
    for name, _, one in accuracies(
        logits,
        lambda text: text_ids(view.tokenizer, text),
        view.identity["dataset"]["end_of_text"],
        config.train.sequence_length,
        [*found],
        job.shots or SHOTS,
        questions=job.questions or QUESTIONS,
        rows=job.micro_batch,
        device=device,
        progress=progress,
    ):
        found[name].append(one)
    return found
