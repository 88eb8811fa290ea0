"""The small verbs' jobs: what `shards`, `generate`, `eval` and the like may be told.

`TARGET` names the key that a bare word after the verb fills.

Invariant: `conf/VERB.yaml` says the same defaults as the class here.
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from forescale.config.duration import Duration
from forescale.config.schema import key, section
from forescale.config.train import CorpusConfig, Problems, TrainJob
from forescale.drill.scenarios import BY_NAME
from forescale.drill.scenarios import problems as problems_of_scenarios
from forescale.plan.config import PlanJob
from forescale.scaling.config import StudyJob
from forescale.slurm.config import SubmitJob


@dataclass
class RootConfig:
    root: str = key("runs", "the directory that holds the runs")


def _needs(target: str | None, verb: str) -> Problems:
    if target:
        return []
    return [("target", "names nothing", f"give a run or a path: forescale {verb} first")]


_STEP = "the checkpoint at this step; null: the newest"
_TRUST = "run the class that the run's config names as its model's _target_"


@dataclass
class GenerateJob:
    TARGET: ClassVar[str] = "target"

    target: str | None = key(None, "a run (name or directory) or a checkpoint")
    step: int | None = key(None, _STEP, ge=0)
    prompt: str = key("", "the text to go on from; nothing: the start of a document")
    num_tokens: int = key(200, "tokens to write", ge=1)
    temperature: float = key(0.8, "0: always the likeliest token", ge=0)
    top_k: int | None = key(50, "choose among so many likeliest tokens; null: all", ge=1)
    seed: int = key(1337, "of the sampling", ge=0)
    trust: bool = key(False, _TRUST)
    run: RootConfig = section(RootConfig, "where the runs live")

    def problems(self) -> Problems:
        return _needs(self.target, "generate")


@dataclass
class EvalJob:
    TARGET: ClassVar[str] = "target"

    target: str | None = key(None, "a run (name or directory) or a checkpoint")
    step: int | None = key(None, _STEP, ge=0)
    split: Literal["train", "validation"] = key("validation", "which part of the dataset")
    windows: int | None = key(None, "so many windows, evenly spread over it; null: all", ge=1)
    micro_batch: int = key(8, "windows at once", ge=1)
    trust: bool = key(False, _TRUST)
    data: CorpusConfig = section(
        CorpusConfig, "what it is scored on; null: what the run trained on"
    )
    run: RootConfig = section(RootConfig, "where the runs live")

    def problems(self) -> Problems:
        return _needs(self.target, "eval")


@dataclass
class ExportJob:
    TARGET: ClassVar[str] = "target"

    target: str | None = key(None, "a run (name or directory) or a checkpoint")
    step: int | None = key(None, _STEP, ge=0)
    to: str | None = key(None, "the directory to write; null: exports/RUN-STEP")
    run: RootConfig = section(RootConfig, "where the runs live")

    def problems(self) -> Problems:
        return _needs(self.target, "export")


@dataclass
class ShardsJob:
    TARGET: ClassVar[str] = "input"

    input: list[str] = key(
        [], "folders, globs, files, URLs, hf:// data sets; or corpora that are tokenised already"
    )
    output: str | None = key(None, "the directory of the dataset; must not exist yet")
    text_key: str = key("text", "the field of a JSON line or the column that holds the text")
    undecodable: Literal["skip", "replace", "fail"] = key("skip", "text that isn't UTF-8")
    empty: Literal["skip", "fail"] = key("skip", "documents without text")
    long: Literal["keep", "cut", "skip", "fail"] = key(
        "keep", "documents of more than max_document_bytes"
    )
    max_document_bytes: int | None = key(None, "where `long` isn't keep", ge=1)
    tokenizer: str | None = key(
        None,
        "a tokenizer.json, a Hugging Face directory with one, or bytes (one token a byte); "
        "null: train a byte-level BPE",
    )
    vocab_size: int = key(32_768, "entries of a tokenizer that is trained", ge=257)
    end_of_text: str | None = key(None, "the token that ends a document; null: the usual names")
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = key(
        None, "of the tokens in a flat .bin that is used in place"
    )
    shard_tokens: int = key(1 << 24, "tokens a tar, about", ge=1)
    member_tokens: int = key(1 << 20, "tokens a member of a tar", ge=1)
    validation_fraction: float = key(0.01, "share of the documents held out", ge=0, le=0.5)
    seed: int = key(1337, "of the shuffle of documents", ge=0)
    workers: int | None = key(None, "processes; null: the CPUs that this one may use", ge=1)

    def problems(self) -> Problems:
        found: Problems = []
        if not self.input:
            found.append(
                ("input", "names no text", "give a path: forescale shards TEXT output=DIR")
            )
        if not self.output:
            found.append(("output", "names no directory", "write output=DIR"))
        if self.shard_tokens < self.member_tokens:
            what = f"{self.shard_tokens} is less than member_tokens={self.member_tokens}"
            found.append(("shard_tokens", what, "make it a multiple of member_tokens"))
        if (self.long == "keep") != (self.max_document_bytes is None):
            what = f"{self.max_document_bytes} doesn't go with long={self.long}"
            todo = "give both a limit and what happens to longer ones, or neither"
            found.append(("max_document_bytes", what, todo))
        return found


@dataclass
class CheckJob:
    TARGET: ClassVar[str] = "target"

    target: str | None = key(None, "a dataset, a checkpoint or a run")
    run: RootConfig = section(RootConfig, "where the runs live")

    def problems(self) -> Problems:
        return _needs(self.target, "check")


@dataclass
class StatusJob:
    TARGET: ClassVar[str] = "target"

    target: str | None = key(None, "a run (name or directory); null: all of them")
    live: bool = key(False, "draw it anew every two seconds; --live does the same")
    run: RootConfig = section(RootConfig, "where the runs live")


@dataclass
class LogsJob:
    TARGET: ClassVar[str] = "target"

    target: str | None = key(None, "a run (name or directory)")
    rank: int | None = key(0, "whose words; null: the batch script's", ge=0)
    attempt: int | None = key(None, "null: the newest that has any", ge=1)
    lines: int = key(50, "so many of the last lines first", ge=0)
    follow: bool = key(True, "go on while the run does")
    run: RootConfig = section(RootConfig, "where the runs live")

    def problems(self) -> Problems:
        return _needs(self.target, "logs")


@dataclass
class StopJob:
    TARGET: ClassVar[str] = "target"

    target: str | None = key(None, "a run (name or directory)")
    now: bool = key(False, "cancel at once, without saving; --now does the same")
    run: RootConfig = section(RootConfig, "where the runs live")

    def problems(self) -> Problems:
        return _needs(self.target, "stop")


@dataclass
class DoctorJob:
    TARGET: ClassVar[str] = ""

    run: RootConfig = section(RootConfig, "where the runs would live")
    data: CorpusConfig = section(CorpusConfig, "where the corpus would be kept")


@dataclass
class PinJob:
    TARGET: ClassVar[str] = "target"

    target: str | None = key(None, "a run (name or directory)")
    step: int | None = key(None, "the checkpoint at this step", ge=0)
    off: bool = key(False, "keep it no longer than the others")
    run: RootConfig = section(RootConfig, "where the runs live")

    def problems(self) -> Problems:
        found = _needs(self.target, "pin")
        if self.step is None:
            found.append(("step", "names no checkpoint", "write step=500; see forescale status"))
        return found


@dataclass
class PruneJob:
    TARGET: ClassVar[str] = "target"

    target: str | None = key(None, "a run (name or directory)")
    keep: int = key(2, "newest checkpoints kept, beside what its config and pins keep", ge=2)
    yes: bool = key(False, "delete; false: only show what would be")
    run: RootConfig = section(RootConfig, "where the runs live")

    def problems(self) -> Problems:
        return _needs(self.target, "prune")


@dataclass
class DrillJob:
    TARGET: ClassVar[str] = ""

    scenarios: list[str] = key([], f"some of {', '.join(BY_NAME)}; none: all")
    processes: Literal[2, 4] = key(2, "ranks of the tiny run; a fault strikes one of them")
    limit: Duration = key(Duration(180, "seconds"), "a command that takes longer is ended")
    to: str | None = key(None, "an empty directory to work in; null: a temporary one")
    keep: bool = key(False, "keep a temporary directory; it is kept where something failed")
    json: str | None = key(None, "a file for the results")

    def problems(self) -> Problems:
        found = problems_of_scenarios(self.scenarios)
        if self.limit.unit != "seconds" or not self.limit.amount:
            found.append(("limit", "must be a wall time", "write limit='3 min'"))
        return found


JOBS: dict[str, Any] = {
    "train": TrainJob,
    "plan": PlanJob,
    "submit": SubmitJob,
    "shards": ShardsJob,
    "generate": GenerateJob,
    "eval": EvalJob,
    "export": ExportJob,
    "check": CheckJob,
    "status": StatusJob,
    "logs": LogsJob,
    "stop": StopJob,
    "doctor": DoctorJob,
    "pin": PinJob,
    "prune": PruneJob,
    "drill": DrillJob,
    "study": StudyJob,
}
