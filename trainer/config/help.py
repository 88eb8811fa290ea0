"""What `forescale VERB --help` prints: every key with its default, every group with its choices.

Invariant: nothing is said twice in the project. Help texts come from the schema's fields, for the
model's from the comments beside them; choices from the first comment of their files; defaults
from the composed tree.
"""

import inspect
import re
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from forescale.config.compose import Group, defaults, groups
from forescale.config.schema import Leaf, leaves, options
from forescale.models.config import ModelConfig
from forescale.verbs.jobs import JOBS

_PURPOSE = {
    "train": "Pretrain a transformer. Without any key: a small one on Python source, in minutes.",
    "plan": "Before the queue: every problem, memory, traffic, hours, price. Needs no GPU.",
    "submit": "Plan a job, freeze it with its code, put it into SLURM's queue; it requeues itself.",
    "logs": "Follow what a run's ranks say; of one that failed, the rank that failed first.",
    "stop": "Have a run save and end, wherever it runs; in a queue it is not requeued.",
    "study": "Plan runs under a cap, launch them, fit their law, foretell a bigger run, be scored.",
    "shards": "Turn your text into tokenised, checksummed webdataset shards.",
    "generate": "Let a trained model write.",
    "eval": "Score a model on held-out text: loss and bits per byte.",
    "export": "Write a model as transformers.AutoModelForCausalLM reads it.",
    "check": "Verify a dataset, a checkpoint or a run, byte for byte.",
    "status": "Show what runs are doing.",
    "pin": "Keep a checkpoint for good, whatever else is deleted.",
    "prune": "Delete the checkpoints that need not stay; first show them.",
    "doctor": "Show what this machine has, and how to mend what it lacks.",
    "drill": "Inject faults into a tiny run, and show what it survives and what that costs.",
}
_WORD = {"run.name": "RUN", "input": "TEXT", "target": "RUN|PATH", "": ""}
_EXAMPLES = {
    "train": (
        "train",
        "train experiment=quick",
        "train optimizer=adamw optimizer.learning_rate=1e-3 run.name=slower",
        "train data=dataset data.path=/data/books model=llama-160m train.tokens=3e9",
        "train model._target_=mypackage.Model model.width=256 run.name=mine",
    ),
    "plan": (
        "plan model=llama-7b engine=zero3 plan.gpus=64 train.tokens=1e12   (all keys of train)",
        "plan machine=a100-80g plan.nodes=4 model=llama-1b data=dataset data.path=/data/books",
        "plan plan.from_run=first plan.gpu_hour=2.5   (speed as a run measured it)",
        "plan model=llama-7b plan.gpus=64 plan.deepspeed=true --json",
    ),
    "submit": (
        "submit train big slurm.nodes=8 slurm.gpus_per_node=8 model=llama-7b engine=zero3",
        "submit train big --dry-run   (the script; nothing is written)",
        "submit train machine=cpu slurm.partition=cpu slurm.tasks_per_node=4 slurm.time='2 h'",
        "submit train slurm.runs=sweep.txt slurm.at_once=4   (a line a run, as one array)",
        "submit train big   (the same again goes on where the run was)",
    ),
    "logs": ("logs first", "logs first rank=3 follow=false", "logs first rank=null lines=200"),
    "stop": ("stop first", "stop first --now   (cancel, without saving)"),
    "study": (
        "study plan study=mine plan.cap=1e15 target.flops=4e15   (what to run, how sure)",
        "study plan study=mine plan.cap=1e18 -- data.path=DIR model.mlp=gelu   (of all runs)",
        "study launch study=mine launch.at_once=2   (the same again goes on where it was)",
        "study launch study=mine launch.slurm=PROFILE -- slurm.time='2 h'   (cells as arrays)",
        "study status study=mine --live",
        "study next study=mine cap=1e15 add=true   (more runs where they tell most)",
        "study fit study=mine; study report study=mine   (of a planned study's own runs)",
        "study fit 'runs/*' target.flops=1e18",
        "study fit points.csv columns='{parameters: Model Size, flops: Training FLOP}'",
        "study fit points.csv form=over-training target.parameters=7e9 target.tokens=1e12 --json",
        "study report 'runs/*' target.flops=1e18   (pictures: studies/first/report.html)",
        "study records 'runs/*' > records.csv   (a row a run)",
        "study predict 'runs/small-*' target.run=big target.parameters=1e8 target.tokens=2e9",
        "study score 'runs/*'   (what was foretold, beside what came out)",
    ),
    "shards": (
        "shards books/ output=/data/books",
        "shards wiki.jsonl.zst output=w tokenizer=bytes",
        "shards 's3://bucket/web/*.parquet' output=/data/web text_key=content",
        "shards corpus.bin output=/data/web tokenizer=tokenizer.json   (token ids, used in place)",
        "shards show /data/books   (what a dataset holds)",
    ),
    "generate": ('generate first prompt="def main("', "generate first step=500 temperature=0"),
    "eval": ("eval first", "eval first data.path=/data/books"),
    "export": ("export first to=exports/first",),
    "check": ("check first", "check /data/books"),
    "status": ("status", "status first"),
    "pin": ("pin first step=500", "pin first step=500 off=true"),
    "prune": ("prune first keep=2", "prune first keep=2 yes=true"),
    "doctor": ("doctor",),
    "drill": ("drill", "drill scenarios=[kill,freeze-data]", "drill to=drilled json=drill.json"),
}
_MARK = {"identity": "!", "numerics": "~", "free": " "}
_LEGEND = """\
A run that goes on refuses another value of a key marked !, and takes one of a key marked ~
with a note that it isn't exact to the bit from there. All others may change at any time."""


def explain(verb: str, conf_dirs: Sequence[str | Path] = ()) -> str:
    """The manual page of a verb, as text; raises UserError for an unknown verb."""
    choices = groups(verb, conf_dirs)
    schema = JOBS[verb]
    found, composed = leaves(schema), defaults(verb)
    word = _WORD[schema.TARGET]
    usage = f"forescale {verb}{f' [{word}]' if word else ''} [KEY=VALUE ...]"
    parts = [f"{usage}\n\n{_PURPOSE[verb]}", "Examples\n" + _lines(_EXAMPLES[verb])]
    if choices:
        tables = "\n".join(_choices(group) for group in choices.values())
        parts.append("Choices, GROUP=CHOICE (* unless told otherwise)\n" + tables)
    sections: dict[str, list[str]] = {}
    for leaf in found.values():
        title = leaf.path.partition(".")[0] if "." in leaf.path else ""
        sections.setdefault(title, []).append(_key(leaf, composed.get(leaf.path)))
    legend = f"\n{_LEGEND}" if verb == "train" else ""
    parts.append("Keys, KEY=VALUE, with their defaults" + legend)
    return "\n\n".join(parts + ["\n".join(lines) for lines in sections.values()]) + "\n"


def _lines(examples: Sequence[str]) -> str:
    return "\n".join(f"  forescale {example}" for example in examples)


def _choices(group: Group) -> str:
    rows = []
    for n, (choice, path) in enumerate(sorted(group.files.items())):
        name = choice + (" *" if choice == group.default else "")
        rows.append(_row(f"  {group.name if n == 0 else '':<11} {name:<15} ", _first_comment(path)))
    return "\n".join(rows)


def _first_comment(path: Path) -> str:
    lines = (line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    return next(lines, "").removeprefix("#").strip()


def _key(leaf: Leaf, default: Any) -> str:
    return _row(f"{_MARK[leaf.kind]} {leaf.path:<30} {_value(default):<12} ", _help(leaf))


def _value(default: Any) -> str:
    """A default as a user would type it."""
    if default is None or default == "" or isinstance(default, bool):
        return {None: "null", "": '""'}.get(default, str(default).lower())
    return f"{default:_}" if isinstance(default, int) and default >= 10_000 else str(default)


def _help(leaf: Leaf) -> str:
    text = leaf.help or _comments().get(leaf.path, "")
    for type_ in options(leaf.type):
        if get_origin(type_) is Literal:
            text += f" ({' | '.join(map(str, get_args(type_)))})"
    return text.strip()


@cache
def _comments() -> dict[str, str]:
    """The comment beside each field of the model's schema, which knows no metadata of ours."""
    source = inspect.getsource(ModelConfig)
    beside = re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE)
    return {f"model.{name}": text.replace("None:", "null:") for name, text in beside}


def _row(head: str, text: str) -> str:
    """`head`, then `text` wrapped in the column beside it."""
    lines = textwrap.wrap(text, max(30, 100 - len(head))) or [""]
    return "\n".join([head + lines[0], *(" " * len(head) + line for line in lines[1:])]).rstrip()
