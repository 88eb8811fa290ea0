"""The held-out loss of a run whose model is a class of the user's own, from its logits alone.

A class of one's own computes its loss itself (train/model.py), so that a mistake there looks like a
gain. The judge asks for logits without showing the targets, and computes the loss from them by
torch. It also changes the tokens after a place, and the logits before it must not move: a model
that sees the next token knows the answer.

    python -m forescale.trials.judge RUN    prints {"loss": nats a token, "moved": ...} as JSON

Invariant: the windows and the held-out text of the run's own last evaluation. The class runs in a
process of its own, in the directory of its code. It is judged, not locked in: code that wants to
could change the judge.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from forescale.ground.errors import UserError
from forescale.run.directory import Run

_MOVES = 1e-4  # a logit that moves by more, relative to the largest, saw a later token
_WINDOWS = 4  # whose later tokens are changed


@dataclass(frozen=True)
class Judgement:
    """loss: in nats a token; moved: how far a logit moved when later tokens changed, relative to
    the largest logit."""

    loss: float
    moved: float


def judged(run: Run, folder: Path) -> Judgement:
    """Return the judgement of a complete run. folder: of its code. Raises UserError if it has none,
    or if its logits depend on later tokens."""
    command = [sys.executable, "-P", "-m", "forescale.trials.judge", str(run.path.absolute())]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2].removeprefix("forescale: ")[:300]
        raise UserError(str(run.path), f"can't be judged by its logits: {why}", "mend the class")
    result = Judgement(**json.loads(done.stdout.strip().rpartition("\n")[2]))
    if not result.moved <= _MOVES:
        problem = f"its logits move by {result.moved:.1e} when only later tokens change: it sees "
        problem += "the tokens that it is to predict"
        raise UserError(str(run.path), problem, "mend the model's mask; the attempt counts")
    return result


def main(path: str) -> None:
    """Judge a run and print the result."""
    import torch

    from forescale.config.eval import ScoreJob
    from forescale.data.stream import MicroBatch
    from forescale.inference.scoring import datasets_of
    from forescale.inference.view import RunView
    from forescale.train.evaluate import evaluate

    view = RunView(Run(Path(path)))
    model, config = view.model(trust=True).eval(), view.config
    datasets = datasets_of(view, ScoreJob().data)
    if len(datasets) > 1:
        problem = "was trained on a mixture, whose loss is judged of models of forescale alone"
        raise UserError(path, problem, "choose one dataset as data.path")
    (dataset,) = datasets.values()

    def losses(micro: MicroBatch) -> torch.Tensor:
        documents = {} if micro.documents is None else {"documents_BL": micro.documents}
        with torch.no_grad():
            logits = model(micro.tokens, **documents).float()
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), micro.targets, ignore_index=-100, reduction="none"
        ).sum(1)

    split = dataset.split("validation")
    score = evaluate(
        losses, split, dataset.token_bytes, sequence_length=config.train.sequence_length,
        micro_batch=config.train.micro_batch, documents=config.data.document_mask,
    )  # fmt: skip
    windows = torch.randint(0, dataset.vocab_size, (_WINDOWS, config.train.sequence_length))
    middle = windows.shape[1] // 2
    other = windows.clone()
    other[:, middle:] = (other[:, middle:] + 1) % dataset.vocab_size
    with torch.no_grad():
        a, b = model(windows)[:, :middle].float(), model(other)[:, :middle].float()
    moved = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
    print(json.dumps({"loss": score.loss, "moved": moved}))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except UserError as e:
        sys.exit(f"forescale: {e}")
