"""What the READMEs say exists: verbs, command lines, keys, files, links, benchmarks."""

import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from forescale.config.compose import compose, groups
from forescale.config.job import overrides_of
from forescale.config.schema import leaves
from forescale.config.train import TrainJob
from forescale.slurm.config import SubmitJob
from forescale.verbs import VERBS, load, schema_of
from forescale.verbs.study import refuse_other_keys
from tests.benchmarks.run import NAMES

ROOT = Path(__file__).parents[1]
TOPS = ("trainer", "models", "conf", "slurm", "tests")
READMES = [
    ROOT / "README.md",
    ROOT / "models/RESULTS.md",
    ROOT / "trainer/AGENTS.md",
    *sorted(p for top in TOPS for p in (ROOT / top).rglob("README.md")),
]
MOST = 12_288  # bytes of the first page
# Sentences that nobody understood at the first reading, each in two parts: this file holds none.
GONE = [
    ("whatever ranks must agree on is a field", " of the one word"),
    ("all steps before are told, and", " Ill.position"),
    ("Whether `step`, with its word, is due", "; and look ahead"),
    ("nothing is deleted that a later one has", " not been read back"),
    ("of its files the i-th,", " the one n later"),
    ("which of a window is the number", " of its tokens"),
    ("nor one that may still be", " where it is"),
    ("the one that met dearer runs", " best, as far beyond"),
    ("fitted to the cheaper budgets and", " meets the dearer"),
    ("a rank is told of when it needs", " so many times"),
]  # fmt: skip
_MADE_UP = re.compile(r"\b[A-Z][A-Z_]*\b|/NNNN|rank-N")  # stands for something, as in runs/NAME


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(text: str) -> list[list[str]]:
    """The arguments of every `forescale ...` line of the shell blocks, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    split = (shlex.split(line, comments=True) for line in lines if line.startswith("forescale "))
    return [[w for w in words[1:] if w not in (">", "records.csv")] for words in split]


def spans(text: str) -> list[str]:
    """The inline code, outside of blocks."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside)]


OF_CLASSES = ("model._target_", "optimizer._target_")  # keys that name a class of the user's own


@cache
def keys() -> set[str]:
    """Every key of every verb, with the sections that hold them."""
    names = {*OF_CLASSES}
    for verb in VERBS:
        for path in leaves(load(verb).JOB):
            parts = path.split(".")
            names |= {".".join(parts[: n + 1]) for n in range(len(parts))}
    return names


def settable(job: type) -> set[str]:
    """The keys of a verb, and its blocks, whose value may be a word."""
    return {name for path in leaves(job) for name in (path, path.removesuffix(".kind"))}


def test_the_table_of_verbs_is_the_registry():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert dict(rows[: len(VERBS)]) == VERBS, "\n" + "\n".join(
        f"| `{verb}` | {purpose} |" for verb, purpose in VERBS.items()
    )


def test_the_first_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= MOST
    line = next(line for line in text.splitlines() if line.endswith("pytest"))  # .ci/run runs it
    assert line == ('python3 -m venv .venv && .venv/bin/pip install ".[dev]" && .venv/bin/pytest')


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_every_local_link_leads_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_every_file_that_is_named_exists(path):
    bases = [ROOT, path.parent, ROOT / "trainer"]
    for span in spans(path.read_text()):
        named = [w for w in re.split(r"[\s:;]+", span) if re.match(rf"({'|'.join(TOPS)})/", w)]
        if "/" in span or re.fullmatch(r"\w+\.(py|j2|toml|sh)", span):
            named += [span] if re.fullmatch(r"[\w/.-]+(\.(py|j2|toml|sh|svg)|/)", span) else []
        for word in named:
            if not _MADE_UP.search(word) and not word.startswith(("runs/", "studies/", "report")):
                below = path.parent.rglob(word) if "/" not in word else ()
                assert any((base / word).exists() for base in bases) or any(below), word


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_every_key_that_is_named_exists(path):
    sections = {key.partition(".")[0] for key in keys() if "." in key}
    for span in spans(path.read_text()):
        match = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+)(=.*)?", span)
        is_key = match and match[1].partition(".")[0] in sections
        if is_key and Path(match[1]).suffix not in (".py", ".json", ".yaml", ".jsonl", ".html"):
            assert match[1] in keys(), span


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_every_command_line_of_a_block_is_one(path):
    for words in commands(path.read_text()):
        verb, *rest = words
        job = schema_of(load(verb), rest)
        rest, second = divided(rest)
        rest = [word for word in rest if not word.startswith("--")]  # flags stand for keys
        if verb == "study":
            action, *rest = rest
            refuse_other_keys(action, overrides_of(job, rest))
        if verb == "submit" and rest[0] in ("train", "eval"):
            rest = rest[1:]
        if verb == "import":
            path, *rest = rest[rest[:1] == ["hf"] :]
            rest = [f"path={path}", *rest]
        if rest[:1] == ["show"]:
            rest = ["text", "output=none"]
        if verb == "study" and not any(word.endswith("*") or ".csv" in word for word in rest):
            rest.append("input=[none]")  # its runs, where the study is planned
        if verb == "finetune" and any(word.startswith("lora.") for word in rest):
            rest.append("optimizer=adamw")  # which the config of a fine-tuning has
        compose(job, overrides_of(job, rest))
        known = SubmitJob if any(w.startswith("launch.slurm") for w in rest) else TrainJob
        for word in second:
            assert word.partition("=")[0] in {*settable(known), *groups(known), *OF_CLASSES}, word


def divided(words: list[str]) -> tuple[list[str], list[str]]:
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_every_command_of_a_sentence_names_a_verb(path):
    for span in spans(path.read_text()):
        words = span.split()
        if words[0] == "forescale" and len(words) > 1 and words[1].islower():
            verb, known = words[1], settable(load(words[1]).JOB)
            for word in words[2:]:
                if "=" in word and not _MADE_UP.fullmatch(word.partition("=")[0]):
                    assert word.partition("=")[0] in {*known, *groups(load(verb).JOB)}, span


def test_every_choice_of_every_group_is_named():
    rows = re.findall(r"^\| `(\w+)` \|.*", (text := (ROOT / "conf/README.md").read_text()), re.M)
    for group, group_of in groups(SubmitJob).items():
        assert group in rows
        for choice in group_of.files:
            assert f"`{choice}`" in text, f"{group}={choice}"


def test_the_model_that_is_shown_follows_the_protocol():
    text = (ROOT / "conf/README.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Model" in b)
    namespace: dict[str, Any] = {}
    exec(compile(block, "conf/README.md", "exec"), namespace)
    model = namespace["Model"](vocab_size=11, width=8)
    tokens = torch.arange(10).reshape(2, 5)
    assert model(tokens).shape == (2, 5, 11)
    targets = torch.tensor([[1, 2, 3, 4, -100], [-100] * 5])
    losses = model(tokens, targets)
    assert losses.shape == (2,)
    assert losses[1] == 0


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_every_benchmark_that_is_named_exists(path):
    for line in re.findall(r"tests/benchmarks/run\.py((?: [a-z]+)*)", path.read_text()):
        assert set(line.split()) <= set(NAMES)


def test_no_riddle_is_left():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("this is no checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".sh", ".j2") and path.exists():
            text = re.sub(r"[\s\"#]+", " ", path.read_text())
            for first, second in GONE:
                assert first + second not in text, f"{name}: {first}..."
