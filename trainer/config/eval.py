"""The keys of `forescale eval`: what is scored, and on which windows.

Invariant: what decides a score is a key of ScoreJob, so that a job of SLURM scores as a command by
hand does.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NotRequired

from forescale.config.abilities import QUESTIONS, SHOTS, TASKS
from forescale.config.job import Problems, RunJob
from forescale.config.schema import key, section
from forescale.config.sections.data import CorpusConfig
from forescale.config.sections.runtime import ability_problems

_NO_TASKS = ("is of tasks, and none is named", "name some with tasks=[...], or leave it out")
_NEITHER = (
    "is of abilities and tasks, and none is named",
    "name some with abilities=[...] or tasks=[...], or leave it out",
)


@dataclass
class ScoreJob(RunJob):
    """A run and the windows to score it on."""

    # a run (its name or its directory), a checkpoint or a Hugging Face directory
    target: str | None = key(None, common=True)
    split: Literal["train", "validation"] = key("validation", common=True)  # part of the dataset
    # number of windows, evenly spread over the split; null: all
    windows: int | None = key(None, ge=1, common=True)
    # tokens in a window, and a table of loss by position; null: as in training
    sequence_length: int | None = key(None, ge=1)
    # scale rotary positions to sequence_length; null: as in training
    rope_scaling: Literal["ntk", "yarn"] | None = None
    micro_batch: int = key(8, ge=1)  # windows in one forward pass
    trust: bool = False  # allow running the model class (_target_) that the run's config names
    abilities: list[str] = key(
        [],
        "instead of losses, the accuracy on small tasks that are made, not read: "
        f"{', '.join(TASKS)}",
        common=True,
    )
    # instead of losses, the scores on tasks of EleutherAI's lm-evaluation-harness: their files
    # (.yaml) or their names
    tasks: list[str] = key([], common=True)
    shots: list[int] = key(
        [],
        "abilities, tasks: numbers of solved examples before a question; each is measured; []: "
        f"{', '.join(map(str, SHOTS))} for abilities, and what the files of tasks say",
        common=True,
    )
    questions: int | None = key(
        None,
        "abilities, tasks: the first questions of each, at each number; null: "
        f"{QUESTIONS} for abilities, all for tasks",
        ge=1,
        le=10**5,
    )
    # tasks: ask through the run's chat template, with solved examples as earlier turns
    chat: bool = False
    # the dataset to score on; null: the datasets of the run
    data: CorpusConfig = section(CorpusConfig)

    def problems(self) -> Problems:
        """Return a problem for each unknown ability, for what can't be a task's name, and for each
        key of abilities or tasks where none is named."""
        result = [*super().problems(), *ability_problems(self.abilities, self.shots)]
        if self.abilities and self.tasks:
            result.append(("tasks", "abilities is given too", "give one of them"))
        for name in self.tasks:  # to look for it would read the list of lm_eval, 12 s
            if "/" not in name and not any(map(str.isalpha, name)):
                problem = f"{name!r} is neither the name of a task nor a file"
                result.append(("tasks", problem, "write names, such as [arc_easy,mine.yaml]"))
        if self.chat and not self.tasks:
            result.append(("chat", *_NO_TASKS))
        if not self.tasks and not self.abilities:
            is_set = {"shots": self.shots != [], "questions": self.questions is not None}
            result += [(name, *_NEITHER) for name, value in is_set.items() if value]
        return result


@dataclass
class EvalJob(ScoreJob):
    """The same of one checkpoint."""

    VERB: ClassVar[str] = "eval"
    FLAGS: ClassVar = {"--details": "details"}
    PRINTS: ClassVar = {
        "run": str, "step": int, "tokens": int, "loss": NotRequired[float],
        "bits_per_byte": NotRequired[float], "task": NotRequired[str], "of": NotRequired[str],
    }  # fmt: skip
    LINES: ClassVar[str] = "one a score (its other fields: forescale help inference)"

    step: int | None = key(None, ge=0)  # the checkpoint of this step; null: the newest
    # tasks: a new file (.jsonl) for each question, what the model answers, and its score
    answers: str | None = None
    # also bits per byte by file type and by input, the in-context-learning score, and copying of
    # random tokens (of models that continue text); --details does it too
    details: bool = False

    def problems(self) -> Problems:
        result = super().problems()
        if self.details and (self.abilities or self.tasks):
            problem = "are of losses, instead of which abilities or tasks are measured"
            result.append(("details", problem, "leave it out"))
        if self.answers is not None and not self.tasks:
            result.append(("answers", *_NO_TASKS))
        return result
