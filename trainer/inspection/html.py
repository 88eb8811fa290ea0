"""The page of a reading: one HTML file that opens anywhere, without a network.

Invariant: texts of the user's and of the model are escaped; nothing is loaded from elsewhere. Maps
are in the page with 8 bits a weight, all other numbers in full.
"""

import base64
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from forescale.inspection.heads import IS_INDUCTION
from forescale.inspection.interventions import DRAWS
from forescale.inspection.reading import Reading, name_of
from forescale.pages.document import code, render

_HERE = Path(__file__).parent
_MARKS = str.maketrans({"\n": "↵", "\t": "⇥", " ": "·"})  # where a token stands alone


def page(
    reading: Reading,
    pieces: Sequence[str],
    tokenizer: Tokenizer,
    title: str,
    command: Sequence[str],
) -> str:
    """Return the page as HTML. pieces: the text of each token; title: the run and its step;
    command: the words of the command that made it."""
    return render(
        _HERE / "reading.html.j2",
        title=f"Inside {title}",
        lead=[code(shlex.join(["forescale", *command]))],
        reading=reading,
        pieces=pieces,
        threshold=IS_INDUCTION,
        draws=DRAWS,
        has_heads=any(layer.heads for layer in reading.layers),
        without_heads=sorted({layer.mixer for layer in reading.layers if not layer.heads}),
        without_parts=None in reading.ablation.mixers,
        subject="".join(pieces[reading.trace.first : reading.trace.end]) if reading.trace else "",
        answer=spaced(name_of(tokenizer, reading.trace.answer)) if reading.trace else "",
        data=_data(reading, pieces, tokenizer),
        scripts=[_HERE / "reading.js"],
    )


def spaced(piece: str) -> str:
    """Return the text of one token with visible white space."""
    return piece.translate(_MARKS) or "∅"


def _data(reading: Reading, pieces: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the page's script draws."""

    def name(token: int) -> str:
        return spaced(name_of(tokenizer, token))

    return {
        "texts": list(pieces),
        "tokens": [spaced(piece) for piece in pieces],
        "losses": reading.losses,
        "best": [[[name(token), p] for token, p in row] for row in reading.best],
        "lens": [
            [[name(g.token), g.probability, g.of_next, g.entropy] for g in row]
            for row in reading.lens
        ],
        "layers": [
            {
                "mixer": layer.mixer,
                "heads": [vars(head) | {"marked": head.is_induction} for head in layer.heads],
                "maps": [
                    base64.b64encode((m * 255).round().to(torch.uint8).numpy().tobytes()).decode()
                    for m in layer.maps
                ],
            }
            for layer in reading.layers
        ],
        "ablation": vars(reading.ablation),
        "trace": reading.trace and {**vars(reading.trace), "places": [*reading.trace.restored]},
    }
