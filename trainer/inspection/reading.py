"""One reading of a text by a decoder, as plain values, and its tokens as text.

Invariant: positions are those of `tokens`, the first of which begins the document and has no loss.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from forescale.ground.console import Progress, silent
from forescale.ground.errors import UserError
from forescale.inference.details import repeated_tokens
from forescale.inference.generation import pieces
from forescale.inspection import heads
from forescale.inspection.blocks import Decoder, blocks_of
from forescale.inspection.heads import Copying, Head
from forescale.inspection.interventions import Ablation, Trace, ablate, trace
from forescale.models.transformer import Transformer

BEGIN = "<begin>"  # the token that begins a document
_BEST = 5  # of the most likely tokens, shown at each token


@dataclass(frozen=True)
class Layer:
    """A block. maps: attention's weights (H, L, L), or of a mixer without heads its influence
    (1, L, L); heads: [] without heads."""

    mixer: str
    mlp: str
    maps: Tensor
    heads: list[Head]


@dataclass(frozen=True)
class Guess:
    """What the head makes of a stream at one token: the most likely next one and its probability,
    that of the token that does follow (None behind the last), and the entropy in bits."""

    token: int
    probability: float
    of_next: float | None
    entropy: float


@dataclass(frozen=True)
class Reading:
    """losses: of each token, in nats, None of the first. best: for each position the most likely
    next tokens, with their probabilities. lens: for the embedding and each block a Guess at each
    position. trace: None if no subject was given."""

    tokens: list[int]
    losses: list[float | None]
    best: list[list[tuple[int, float]]]
    layers: list[Layer]
    lens: list[list[Guess]]
    ablation: Ablation
    copying: Copying
    trace: Trace | None

    @property
    def loss(self) -> float:
        """The mean loss of the text, in nats a token."""
        known = [loss for loss in self.losses if loss is not None]
        return sum(known) / len(known)

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers but the maps, for JSON."""
        numbers = asdict(self)
        for layer, layer_facts in zip(numbers["layers"], self.layers, strict=True):
            del layer["maps"]
            for head, one in zip(layer["heads"], layer_facts.heads, strict=True):
                head["is_induction"] = one.is_induction
        return {"loss": self.loss, **numbers}


def read(
    model: Decoder,
    tokens: Sequence[int],
    subject: tuple[int, int] | None = None,
    answer: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Reading:
    """Return what a decoder does with a text. tokens: the first begins a document.

    subject: the positions [first, end) of what is traced, see `trace`. Raises UserError for fewer
    than 3 tokens.
    """
    if len(tokens) < 3:
        raise UserError("text", "has fewer than two tokens", "give some words")
    row_L = torch.tensor(list(tokens), device=next(model.parameters()).device)
    lens_NLV = heads.lens(model, row_L).cpu()
    known_LV = lens_NLV[-1].log_softmax(-1)
    losses = -known_LV[:-1].gather(-1, row_L.cpu()[1:, None])[:, 0]
    top = known_LV.exp().topk(_BEST)
    best = [
        list(zip(i.tolist(), p.tolist(), strict=True))
        for i, p in zip(top.indices, top.values, strict=True)
    ]
    if isinstance(model, Transformer):
        most = model.sizes.max_sequence_length
    else:
        most = model.sequence_length
    repeated_L = repeated_tokens(lens_NLV.shape[-1], tokens[0], most, seed)
    repeated_L = repeated_L.to(row_L.device)
    maps = {i: m.cpu() for i, m in heads.maps_of(model, row_L).items()}
    described = heads.describe(
        maps, {i: m.cpu() for i, m in heads.maps_of(model, repeated_L).items()}
    )
    influences = heads.influences_of(model, row_L, seed)
    layers = [
        Layer(
            mixer=block.mixer_kind,
            mlp=block.mlp_kind,
            maps=maps[i] if i in maps else influences[i][None],
            heads=described.get(i, []),
        )
        for i, block in enumerate(blocks_of(model))
    ]
    return Reading(
        tokens=list(tokens),
        losses=[None, *losses.tolist()],
        best=best,
        layers=layers,
        lens=[_guesses(logits_LV, row_L.cpu()) for logits_LV in lens_NLV],
        ablation=ablate(model, row_L, progress),
        copying=heads.copying(model, repeated_L),
        trace=subject and trace(model, row_L, *subject, answer, seed, progress),
    )


def _guesses(logits_LV: Tensor, tokens_L: Tensor) -> list[Guess]:
    chances_LV = logits_LV.softmax(-1)
    entropy_L = torch.special.entr(chances_LV).sum(-1) / torch.log(torch.tensor(2.0))
    best = chances_LV.max(-1)
    of_next = chances_LV[:-1].gather(-1, tokens_L[1:, None])[:, 0].tolist()
    return [
        Guess(int(token), float(p), follows, float(entropy))
        for token, p, follows, entropy in zip(
            best.indices, best.values, [*of_next, None], entropy_L, strict=True
        )
    ]


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the piece of text of each token; of the first, which begins the document, BEGIN."""
    begin, *rest = ids
    texts: list[str] = [BEGIN]
    ids_left = iter(rest)
    taken = 0

    def counted():
        nonlocal taken
        for token in ids_left:
            taken += 1
            yield token

    for piece in pieces(tokenizer, [begin], counted()):
        texts += [""] * (taken - len(texts))  # the first tokens of a character
        texts.append(piece)
    return texts[: len(ids)] + [""] * (len(ids) - len(texts))


def tokens_of(pieces: Sequence[str], subject: str) -> tuple[int, int]:
    """Return the tokens [first, end) that hold the subject where it stands first. Raises UserError
    if the text has no such part."""
    text = "".join(pieces[1:])
    start = text.find(subject)
    if not subject or start < 0:
        problem = f"{subject!r} is not in the {len(pieces) - 1} tokens that are read"
        raise UserError("subject", problem, "copy it from the text")
    ends, at = [], 0
    for piece in pieces[1:]:
        at += len(piece)
        ends.append(at)
    first = next(i for i, end in enumerate(ends) if end > start)
    last = next(i for i, end in enumerate(ends) if end >= start + len(subject))
    return first + 1, last + 2


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """Return a token alone as text: its special name, or its characters."""
    return tokenizer.decode([token], skip_special_tokens=False) or (
        tokenizer.id_to_token(token) or f"<{token}>"
    )
