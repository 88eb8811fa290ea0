"""A curation is compared with the whole text, at toy size."""

import json
import os
import random
import sys

import pytest

from tests import warm
from tests.benchmarks import curated

WORDS = ["the", "model", "that", "reads", "a", "text", "and", "of", "is", "not", "large", "learns"]


def forked(folder, *words):
    """`forescale WORDS`, without the imports of a start."""
    process = warm.Launcher([*map(str, words)], folder, {**os.environ, "OMP_NUM_THREADS": "1"})
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_both_sides_are_trained_and_judged_by_one_text(tmp_path, monkeypatch, capsys):
    rng = random.Random(0)

    def sentences(count: int) -> str:
        return " ".join(" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(count))

    pool = [sentences(30) for _ in range(60)] + ["menu home login\n" * 90] * 40
    for name, texts in (("pool", pool), ("target", [sentences(30) for _ in range(30)])):
        lines = [json.dumps({"text": f"{text} {i}"}) for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("pool", "target")]
    sizes = ["--vocabulary", "300", "--tokens", "6000", "--seeds", "1"]
    small = ["train.compile=off", "model.num_layers=1", "train.sequence_length=64"]
    monkeypatch.setattr(sys, "argv", ["curated.py", *files, *sizes, *small])
    monkeypatch.setattr(curated, "forescale", forked)
    curated.main()
    whole, chosen, seed, last = capsys.readouterr().out.splitlines()
    tokens = [int(line.split()[1].replace(",", "")) for line in (whole, chosen)]
    assert tokens[1] < tokens[0]
    assert "bits per byte of the target" in seed
    assert last.endswith("bits per byte")
