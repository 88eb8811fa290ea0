"""The details of a score, as `eval --details` prints them: a pass over its windows, by token.

Bits per byte by the origin of a document (its file type, and the input that it came with), and how
much the context helps: the in-context-learning score of Olsson et al. 2022 (arXiv 2209.11895), the
loss of the 500th token of a context minus that of the 50th, a mean over texts. It is negative for a
model that uses its context. In windows of fewer than 500 tokens, the last token takes the place of
the 500th, and one a tenth as far that of the 50th; such scores compare only where both places are
equal.

Copying of random tokens shows what induction heads do (also Olsson et al. 2022): a row is the token
that begins documents, random tokens, and the same tokens again. Nothing but the first copy predicts
the second one.

Invariant: windows and losses are those of `score`, so that the sum over all tokens is its loss.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from forescale.config.train import TrainJob
from forescale.data.dataset import Dataset, Split
from forescale.data.stream import held_out_places, spread, validation_windows
from forescale.ground.console import Progress, plus_minus, silent
from forescale.ground.errors import UserError
from forescale.inference.scoring import target_losses
from forescale.train.evaluate import ratio_stderr

LATE, RATIO = 500, 10
MAX_RANDOM = 32  # random tokens of a row
ROWS = 32


@dataclass(frozen=True)
class WindowLosses:
    """The targets of a window, (n,) each. ids: the tokens; nats: their losses; document: the number
    of its document in the split; context: how many tokens the model sees before it."""

    ids: np.ndarray
    nats: np.ndarray
    document: np.ndarray
    context: np.ndarray


def window_losses(
    model: nn.Module,
    split: Split,
    sequence_length: int,
    *,
    windows: int | None = None,
    documents: bool = False,
    progress: Progress = silent,
) -> Iterator[WindowLosses]:
    """Yield the losses of each window of a split, or of so many, evenly spread, as the next token
    is the target. documents: attention stays within documents, as trained.

    Logits of one window are held at a time, (L, V) fp32.
    """
    places = held_out_places(split, sequence_length, None)
    chosen = [places[i] for i in spread(len(places), windows)]
    parts = validation_windows(split, sequence_length, 1, limit=windows, documents=documents)
    starts = np.cumsum([0, *split.shard_tokens])  # of shards, in tokens of the split
    sizes = enumerate(split.shard_tokens)
    ends = [starts[i] + split.document_ends(i, 0, size) for i, size in sizes]
    ends_D = np.concatenate([np.empty(0, np.int64), *ends])
    for done, (window, (shard, ((start, size),))) in enumerate(zip(parts, chosen, strict=True), 1):
        n = size - 1
        nats_L, positions_L = target_losses(model, window)
        yield WindowLosses(
            window.targets[0, :n].numpy(),
            nats_L[:n].numpy(),
            np.searchsorted(ends_D, starts[shard] + np.arange(start + 1, start + size), "right"),
            positions_L[:n].numpy() + 1,
        )
        progress("losses of tokens", done, len(chosen), "windows")


@dataclass(frozen=True)
class Part:
    """The documents of one origin. bits_per_byte: as of Score, of their text alone, with its
    standard error over documents, which are taken as independent; documents, bytes: how many of
    each were scored, a document also if only a part of it was."""

    name: str
    bits_per_byte: float
    stderr: float
    documents: int
    bytes: int


def parts_of(
    dataset: Dataset, split: str, nats_D: np.ndarray, bytes_D: np.ndarray
) -> dict[str, list[Part]]:
    """Return the parts by `kind` (file types) and by `source` (inputs of the dataset), each in the
    order of their bytes, the most first; empty if the dataset doesn't know them: it knows them of
    its validation split, if it was built from text by this version.

    nats_D, bytes_D: those of each document that were scored.
    """
    origins = dataset.origins if split == "validation" else None
    result: dict[str, list[Part]] = {}
    if origins is None:
        return result
    for by, names in (("kind", "kinds"), ("source", "sources")):
        number_D, parts = np.array(origins[by], np.int64), []
        for i, name in enumerate(origins[names]):
            scored = (number_D == i) & ((bytes_D > 0) | (nats_D > 0))
            nats, count = nats_D[scored], bytes_D[scored]
            if total := int(count.sum()):
                ratio = math.fsum(nats) / total
                stderr = ratio_stderr(nats, count, ratio) / math.log(2)
                parts.append(Part(name, ratio / math.log(2), stderr, len(nats), total))
        result[by] = sorted(parts, key=lambda part: -part.bytes)
    return result


@dataclass(frozen=True)
class InContext:
    """score: the mean difference, in nats, of the losses of tokens before which the model sees
    `late` and `early` others, of the same document if it keeps documents apart; stderr: its
    standard error, pairs taken as independent; late_loss, early_loss: the means. NaN without a
    pair."""

    late: int
    early: int
    score: float
    stderr: float
    late_loss: float
    early_loss: float
    pairs: int


class InContextSums:
    """Collects the pairs of losses. length: the most tokens that the model sees."""

    def __init__(self, length: int):
        self._late = min(LATE, length)
        self._early = max(1, self._late // RATIO)
        self._pairs: list[np.ndarray] = []

    def add(self, window: WindowLosses) -> None:
        """Take the pairs of a window."""
        late = np.flatnonzero(window.context == self._late)
        # Contexts grow by one token, so the early one is as many columns before.
        early = late - (self._late - self._early)
        self._pairs.append(np.stack([window.nats[late], window.nats[early]]))

    def score(self) -> InContext:
        """Return the score over all pairs."""
        late, early = np.concatenate([np.empty((2, 0)), *self._pairs], 1)
        n, change = len(late), late - early
        stderr = float(change.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        means = [float(x.mean()) if n else math.nan for x in (change, late, early)]
        return InContext(self._late, self._early, means[0], stderr, means[1], means[2], n)


@dataclass(frozen=True)
class Details:
    """What `measure` returns. parts: bits per byte by `kind` and by `source`, see parts_of."""

    parts: dict[str, list[Part]]
    in_context: InContext


def expect_continuing(config: TrainJob) -> None:
    """Raise UserError for a run without these details: they are of each next token of a text."""
    if not config.continues_text or not config.objective.is_next_token:
        kind = config.objective.kind
        problem = f"are of each next token of a text, and the run has objective={kind}"
        raise UserError("details", problem, "leave it out, or name a run that continues text")


def measure(
    config: TrainJob,
    model: nn.Module,
    dataset: Dataset,
    split: str,
    windows: int | None = None,
    progress: Progress = silent,
) -> Details:
    """Return the details of the score of a model on a split. config: of the run, with the length of
    the windows; windows: as of `score`."""
    sequence_length = config.train.sequence_length
    context, documents = InContextSums(sequence_length), dataset.split(split).num_documents
    nats_D, bytes_D = np.zeros(documents), np.zeros(documents, np.int64)
    for window in window_losses(
        model,
        dataset.split(split),
        sequence_length,
        windows=windows,
        documents=config.data.document_mask,
        progress=progress,
    ):
        context.add(window)
        np.add.at(nats_D, window.document, window.nats)
        np.add.at(bytes_D, window.document, dataset.token_bytes[window.ids])
    return Details(parts_of(dataset, split, nats_D, bytes_D), context.score())


@dataclass(frozen=True)
class Induction:
    """Of rows of `tokens` random tokens that are read twice. first, again: the mean losses of the
    tokens as they are read first and again, in nats; score: again - first, negative for a model
    that copies; share: of the tokens, as they are read again, that are the most likely next one.
    The standard errors are over rows."""

    tokens: int
    rows: int
    first: float
    again: float
    score: float
    score_stderr: float
    share: float
    share_stderr: float


def repeated_tokens(vocab_size: int, begin: int, most: int, seed: int = 0) -> Tensor:
    """Return `begin` and random tokens twice, (1 + 2n,), of at most `most` tokens."""
    n = max(2, min(MAX_RANDOM, (most - 1) // 2))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocab_size, (n,), generator=generator)
    return torch.cat([torch.tensor([begin]), drawn, drawn])


@torch.no_grad()
def induction(
    model: nn.Module, vocab_size: int, begin: int, most: int, rows: int = ROWS
) -> Induction:
    """Return how a model copies. begin: the token that begins documents; most: tokens of a row; the
    i-th row is drawn with seed i."""
    device = next(model.parameters()).device
    losses, hits = [], []
    for seed in range(rows):
        tokens_L = repeated_tokens(vocab_size, begin, most, seed).to(device)
        known = model(tokens_L[None, :-1])[0].float().log_softmax(-1)
        target = tokens_L[1:]
        losses.append(-known.gather(-1, target[:, None])[:, 0].double().cpu())
        hits.append((known.argmax(-1) == target).double().cpu())
    n = len(target) // 2
    first_R, again_R = (torch.stack(losses).view(rows, 2, n).mean(2)).unbind(1)
    share_R = torch.stack(hits).view(rows, 2, n)[:, 1].mean(1)
    return Induction(
        n,
        rows,
        float(first_R.mean()),
        float(again_R.mean()),
        *_mean(again_R - first_R),
        *_mean(share_R),
    )


def _mean(values_R: Tensor) -> tuple[float, float]:
    """Return the mean, and its standard error."""
    n = len(values_R)
    return float(values_R.mean()), float(values_R.std()) / math.sqrt(n) if n > 1 else math.nan


def details_text(details: Details) -> str:
    """Return the bits per byte of the parts as tables, and the in-context-learning score."""
    lines: list[str] = []
    for by, parts in details.parts.items():
        title = {"kind": "file type", "source": "input"}[by]
        wide = max([len(title), *(len(part.name or "none") for part in parts)])
        lines += ["", f"Bits per byte by {title}:", ""]
        lines.append(f"  {title:<{wide}}  {'bits per byte':<17}  documents  bytes")
        for p in parts:
            bits = f"{p.bits_per_byte:.4f}{plus_minus(p.stderr)}"
            row = f"  {p.name or 'none':<{wide}}  {bits:<17}  {p.documents:>9,}  {p.bytes:,}"
            lines.append(row)
    if not details.parts:
        lines += [
            "",
            "No bits per byte by file type: only validation splits of text, built by this version",
            "of forescale, know where their documents come from.",
        ]
    c = details.in_context
    if not c.pairs:
        return "\n".join([*lines, "", f"No in-context-learning score: none has {c.late:,} tokens."])
    lines += [
        "",
        f"In-context-learning score: {c.score:+.4f}{plus_minus(c.stderr)} nats, the loss after "
        f"{c.late:,} tokens ({c.late_loss:.4f})",
        f"less that after {c.early:,} ({c.early_loss:.4f}), over {c.pairs:,} contexts",
    ]
    return "\n".join(lines)


def induction_text(scores: Induction) -> str:
    """Return how a model copies, in a sentence."""
    return (
        f"\nInduction score: {scores.score:+.4f} ± {scores.score_stderr:.4f} nats, the loss of "
        f"{scores.tokens} random tokens as they are read again ({scores.again:.4f})\nless that as "
        f"they are read first ({scores.first:.4f}), over {scores.rows} rows; "
        f"{100 * scores.share:.1f} ± {100 * scores.share_stderr:.1f} % of the\ntokens read again "
        "are the most likely next one"
    )
