"""Studies of one's own, from plan to score, again and again: how good is the forecast of a target?

    FORESCALE_CORPORA='prose=DIR,manuals=DIR' python tests/benchmarks/run.py repetitions --rounds 4

Each repetition is a whole study with a seed and a corpus of its own: a pilot, five budgets of five
sizes, the target's forecast, and then its training, with four times the compute of the most
expensive run. The corpora are the embedded one (code), and the datasets of bytes that are named,
in turn: `forescale shards FOLDER output=DIR tokenizer=bytes`. Prose was 25 MB of the books in
github.com/mlschmitt/classic-books-markdown, in documents of 8,000 characters; manuals the 24 MB of
man pages of a Debian system, unpacked. Studies stay in $FORESCALE_REPETITIONS, or in
runs/repetitions: what is complete there is read and not trained again, so that ten repetitions may
take several nights.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from forescale import cli
from forescale.resilience import pool
from forescale.scaling.analysis.forecast import read_forecasts, score
from forescale.scaling.study import launching
from forescale.scaling.study.directory import TARGET, Study
from tests.benchmarks.pairing import Result
from tests.trainer.scaling.fake_training import FakeSubprocess

SHARED = ("optimizer=adamw", "validation.every=100 %", "train.compile=off", "precision=fp32")


@dataclass(frozen=True)
class Sizes:
    """words: of `study plan`; trains: whether runs are trained, or made up by a law."""

    words: tuple[str, ...]
    trains: bool = True


REAL = Sizes((
    *("plan.pilot=true", "plan.cap=2.4e13", "plan.budgets=4", "plan.step=1.8", "plan.ratio=40"),
    *("plan.sequence_length=128", "plan.seeds=[2,1]", "target.flops=3.2e12"),
))  # fmt: skip
TOY = Sizes((
    *("plan.budgets=3", "plan.sizes=3", "plan.cap=1e14", "plan.sequence_length=32"),
    *("plan.seeds=[1,1]", "target.flops=4e13", "near=null", "bootstraps=100"),
), trains=False)  # fmt: skip


def corpora() -> list[tuple[str, tuple[str, ...]]]:
    """Return the name of each corpus, and the words of `train` that name its data."""
    named = os.environ.get("FORESCALE_CORPORA", "")
    pairs = [text.split("=", 1) for text in named.split(",") if text]
    rest = [(name, ("data=dataset", f"data.path={where}")) for name, where in pairs]
    return [("code", ("data=bytes",)), *rest]


def studied(sizes: Sizes, folder: Path, data: tuple[str, ...], seed: int) -> Study:
    """Return the study of this folder, planned and launched to its end if it isn't yet."""
    where = [f"studies={folder.parent}", f"study={folder.name}"]
    words = [*sizes.words, f"seed={seed}", "--", *data, *SHARED]
    if not (folder / "plan.json").is_file():
        assert cli.main(["study", "plan", *where, *words]) == 0
    with pytest.MonkeyPatch.context() as patch:
        if not sizes.trains:
            patch.setattr(pool, "subprocess", FakeSubprocess)
            patch.setattr(launching, "_POLL", 0.0)
        launch = ["launch.at_once=2", "launch.target=true", "launch.contradiction=continue"]
        assert cli.main(["study", "launch", *where, *launch]) == 0
    return Study(folder)


def scores(rounds: int, sizes: Sizes) -> Iterator[tuple[str, float, float, bool, dict[str, float]]]:
    """Yield of each repetition its name, the target's predicted and observed loss, whether that is
    in the 90 % interval, and the skill against each rival."""
    root = Path(os.environ.get("FORESCALE_REPETITIONS", "runs/repetitions")).absolute()
    for i in range(rounds):
        name, data = corpora()[i % len(corpora())]
        study = studied(sizes, root / f"{'' if sizes.trains else 'toy-'}{i}-{name}", data, 1 + i)
        of_target = [
            f for f in read_forecasts(study.forecasts) if f.facts["target"]["run"] == TARGET
        ]
        s = score(of_target, study.table())
        predicted = of_target[0].facts["loss"]
        observed = predicted / math.exp(s.errors[of_target[0].id])
        yield f"{i} {name}", predicted, observed, bool(s.inside), s.skill


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    """Return and print each repetition's target: predicted, observed, inside, and the skill."""
    print("| repetition | predicted | observed | error | inside 90 % | skill against |")
    print("|---|---|---|---|---|---|")
    rows, inside, skills = list[tuple[float]](), 0, dict[str, float]()
    for name, predicted, observed, is_inside, skill in scores(rounds, sizes):
        error = predicted / observed - 1
        rivals = ", ".join(f"{rival} {value:+.2f}" for rival, value in skill.items())
        line = f"| {name} | {predicted:.4f} | {observed:.4f} | {error:+.2%} "
        print(line + f"| {'yes' if is_inside else 'no'} | {rivals} |", flush=True)
        rows.append((abs(error),))
        inside += is_inside
        skills[name] = skill.get("line", math.nan)
    facts = {"inside": f"{inside} of {len(rows)}", "skill against the line": skills}
    return [Result("error of the target's forecast", "", ("error",), rows, "at most 1 %", facts)]
