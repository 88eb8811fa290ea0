"""A small synthetic corpus for the tests of the data room; also imported by processes that tests
kill."""

import hashlib
import random
from collections.abc import Iterator

from forescale.data.prepare.builder import BuildConfig
from forescale.data.text.documents import Document, Intake, ReadingReport, Unit

WORDS = ["def", "return", "self", "naïve", "数据", "for", "in", "class\n\t", "🙂", "x0", "=="]
SMALL = BuildConfig(
    vocab_size=300, validation=0.2, shard_tokens=1500, member_tokens=400, tokenizer_bytes=20_000
)


class Texts:
    """Documents from memory, `per_unit` documents per unit, with the default policy for faulty
    text."""

    def __init__(self, texts: list[bytes], per_unit: int = 1_000_000):
        self.texts, self.per_unit, self.sources = texts, per_unit, ["texts"]

    def describe(self) -> dict:
        return {"kind": "texts", "count": len(self.texts)}

    def state(self) -> Iterator[tuple[str]]:
        yield (hashlib.sha256(b"\0".join(self.texts)).hexdigest(),)

    def units(self) -> list[Unit]:
        starts = range(0, len(self.texts), self.per_unit)
        return [self._unit(i, min(i + self.per_unit, len(self.texts))) for i in starts]

    def _unit(self, first: int, last: int) -> Unit:
        size = sum(map(len, self.texts[first:last]))
        return Unit(f"texts {first} to {last - 1}", size, 0, first, last)

    def read(self, unit: Unit, report: ReadingReport) -> Iterator[Document]:
        for i in range(unit.first, unit.last):
            yield from Intake(report).documents(f"text-{i}", self.texts[i])


def synthetic(count: int = 60, seed: int = 1) -> list[bytes]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(WORDS, k=rng.randint(1, 200))).encode() + b" %d" % i
        for i in range(count)
    ]
