"""A small synthetic corpus for the tests of data/; also imported by processes that tests kill."""

import random
from collections.abc import Iterator

from trainer.data.build import BuildConfig
from trainer.data.text import Document, Report, decoded

WORDS = ["def", "return", "self", "naïve", "数据", "for", "in", "class\n\t", "🙂", "x0", "=="]
SMALL = BuildConfig(
    vocab_size=300, validation=0.2, shard_tokens=1500, member_tokens=400, tokenizer_bytes=20_000
)


class Texts:
    """Documents from memory; the policy for faulty text is the product's own."""

    def __init__(self, texts: list[bytes]):
        self.texts = texts

    def describe(self) -> dict:
        return {"kind": "texts", "count": len(self.texts)}

    def documents(self, report: Report) -> Iterator[Document]:
        for i, text in enumerate(self.texts):
            yield from decoded(f"text-{i}", text, report)


def synthetic(count: int = 60, seed: int = 1) -> list[bytes]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(WORDS, k=rng.randint(1, 200))).encode() + b" %d" % i
        for i in range(count)
    ]
