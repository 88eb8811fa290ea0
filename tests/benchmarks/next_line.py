"""Writes a task of lm_eval from held-out text: which of four lines follows this function head?

    python tests/benchmarks/next_line.py DATASET DIR [QUESTIONS]

DATASET: what `forescale shards` built, or the embedded corpus, whose directory `forescale eval`
names. The three wrong lines follow other heads of the same text, and are as far indented.
"""

import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from forescale.data.dataset import Dataset

# A head of one line, and the first line of code after it.
_HEAD = re.compile(r"^( *)def \w+\([^\n]*\)[^\n]*:\n( +)([^\n\"'#]{4,80})\n", re.MULTILINE)
_BEFORE = 160  # characters of text before a head

TASK = """\
task: next_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{lines}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1}}
"""


def documents(dataset: Dataset) -> Iterator[str]:
    """Yield the held-out documents as text."""
    split = dataset.split("validation")
    for shard, size in enumerate(split.shard_tokens):
        ids = split.read(shard, 0, size).astype(np.int64)
        cuts = np.flatnonzero(ids == dataset.end_of_text)
        for part in np.split(ids, cuts):
            yield dataset.tokenizer.decode(part[part != dataset.end_of_text].tolist())


def questions(texts: Iterator[str], count: int) -> list[dict]:
    """Return so many questions, drawn by seed 0."""
    heads = defaultdict(list)  # by indentation: a text up to its head, and the next line
    for text in texts:
        for match in _HEAD.finditer(text):
            start = text[max(0, match.start() - _BEFORE) : match.start(2)]
            heads[match[2]].append((start, f"{match[2]}{match[3]}\n"))
    rng, rows = random.Random(0), []
    for indent in sorted(heads):
        for start, right in heads[indent]:
            others = sorted({line for _, line in heads[indent]} - {right})
            if len(others) >= 3:
                lines = [right, *rng.sample(others, 3)]
                rng.shuffle(lines)
                rows.append({"start": start, "lines": lines, "right": lines.index(right)})
    return rng.sample(rows, min(count, len(rows)))


def main(where: str, folder: str, count: str = "400") -> None:
    """Write DIR/next_line.yaml and DIR/next_line.jsonl."""
    to = Path(folder)
    to.mkdir(parents=True, exist_ok=True)
    rows, data = questions(documents(Dataset(where)), int(count)), to / "next_line.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in rows))
    (to / "next_line.yaml").write_text(TASK.format(data=data.resolve()))
    print(f"{to / 'next_line.yaml'}: {len(rows)} questions")


if __name__ == "__main__":
    main(*sys.argv[1:])
