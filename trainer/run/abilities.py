"""The questions that the evaluations of a run ask (validation.abilities)."""

from forescale.abilities.questions import Questions, expect_fitting, questions_of
from forescale.config.train import TrainJob
from forescale.data.dataset import Sources
from forescale.data.tokenizer import text_ids
from forescale.errors import UserError


def questions_of_job(job: TrainJob, sources: Sources) -> list[Questions]:
    """Return the questions, none if nothing is asked.

    Raises UserError if examples don't fit the windows of the training, or if there is no held-out
    text: the results stand in its rows.
    """
    wanted, tokenizer = job.validation, sources.tokenizer
    if not wanted.abilities:
        return []
    if not any(split.num_tokens for split in sources.split("validation").values()):
        problem = "the data has no held-out text, in whose rows they would stand"
        todo = "leave it out, or make a dataset with validation_fraction above 0"
        raise UserError("validation.abilities", problem, todo)
    found = questions_of(
        lambda text: text_ids(tokenizer, text),
        sources.end_of_text,
        wanted.abilities,
        wanted.shots,
        questions=wanted.questions,
    )
    length = job.train.sequence_length
    expect_fitting(found, length, "validation.shots", "train.sequence_length")
    return found
