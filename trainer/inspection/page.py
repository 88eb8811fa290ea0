"""The page of a reading: one HTML file that opens anywhere, without a network.

Invariant: texts of the user's and of the model are escaped; nothing is loaded from elsewhere. Maps
are in the page with 8 bits a weight, all other numbers in full.
"""

import base64
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from tokenizers import Tokenizer

from forescale.inspection.heads import IS_INDUCTION
from forescale.inspection.reading import Reading
from forescale.inspection.spelling import name_of
from forescale.inspection.tracing import DRAWS, PLACES

_TEMPLATE = Path(__file__).with_name("page.html.j2")
_MARKS = str.maketrans({"\n": "↵", "\t": "⇥", " ": "·"})  # where a token stands alone


def page(
    found: Reading, pieces: Sequence[str], tokenizer: Tokenizer, title: str, command: Sequence[str]
) -> str:
    """Return the page as HTML. pieces: the text of each token; title: the run and its step;
    command: the words of the command that made it."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_TEMPLATE.read_text()).render(
        title=title,
        found=found,
        pieces=pieces,
        command=shlex.join(["forescale", *command]),
        threshold=IS_INDUCTION,
        draws=DRAWS,
        has_heads=any(layer.heads for layer in found.layers),
        without_heads=sorted({layer.mixer for layer in found.layers if not layer.heads}),
        subject="".join(pieces[found.trace.first : found.trace.end]) if found.trace else "",
        answer=shown(name_of(tokenizer, found.trace.answer)) if found.trace else "",
        data=Markup(_script(_data(found, pieces, tokenizer))),
    )


def shown(piece: str) -> str:
    """Return the text of one token with visible white space."""
    return piece.translate(_MARKS) or "∅"


def _data(found: Reading, pieces: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the page's script draws."""

    def name(token: int) -> str:
        return shown(name_of(tokenizer, token))

    return {
        "texts": list(pieces),
        "tokens": [shown(piece) for piece in pieces],
        "losses": found.losses,
        "best": [[[name(token), p] for token, p in row] for row in found.best],
        "lens": [
            [[name(g.token), g.probability, g.of_next, g.entropy] for g in row]
            for row in found.lens
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
            for layer in found.layers
        ],
        "ablation": vars(found.ablation),
        "trace": found.trace and {**vars(found.trace), "places": list(PLACES)},
    }


def _script(data: Any) -> str:
    """Return data as JSON that can stand in a script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text
