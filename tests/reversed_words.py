"""A dataset of pairs: a word, a tab, and the word from its end on; made in a moment."""

import itertools
import json
from pathlib import Path

from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.text.files import Files

LETTERS = "abc"
LONGEST = 4  # letters of a word
NO_PAIRS = ("no tab", "\tno source", "too long" * 9 + "\ttoo long", "short\t" + "too long" * 9)
KIND = ["objective=pairs", r"objective.separator=\t"]


def words(longest: int = LONGEST) -> list[str]:
    """All words of so many letters or fewer, without the empty one."""
    sizes = range(1, longest + 1)
    return ["".join(w) for n in sizes for w in itertools.product(LETTERS, repeat=n)]


def make_pairs(path: Path, no_pairs: tuple[str, ...] = ()) -> Path:
    """A dataset of bytes with all pairs, in shards of some 250 tokens, and other documents."""
    text = path.with_name(f"{path.name}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{word}\t{word[::-1]}" for word in words()] + list(no_pairs)
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    sizes = {"validation": 0.1, "shard_tokens": 250, "member_tokens": 100}
    return build_dataset(Files([text]), path, BuildConfig(tokenizer="bytes", **sizes))
