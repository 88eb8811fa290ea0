"""The details of a score as text."""

from collections.abc import Iterator, Sequence

from forescale.inference.details.induction import Induction
from forescale.inference.details.measure import Details, Part

_BY = {"kind": "file type", "source": "input"}


def details_text(details: Details) -> str:
    """Return the bits per byte of the parts as tables, and the in-context-learning score."""
    lines = [line for by, parts in details.parts.items() for line in _table(_BY[by], parts)]
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
        f"In-context-learning score: {c.score:+.4f} ± {c.stderr:.4f} nats, the loss after "
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


def _table(by: str, parts: Sequence[Part]) -> Iterator[str]:
    wide = max(len(by), *(len(part.name or "none") for part in parts)) if parts else 0
    yield from ("", f"Bits per byte by {by}:", "")
    yield f"  {by:<{wide}}  {'bits per byte':<17}  documents  bytes"
    for p in parts:
        bits = f"{p.bits_per_byte:.4f} ± {p.stderr:.4f}"
        yield f"  {p.name or 'none':<{wide}}  {bits:<17}  {p.documents:>9,}  {p.bytes:,}"
