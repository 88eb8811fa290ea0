"""Read access to a run from Python: its rows as DataFrames, its checkpoints, its model.

Invariant: reading never changes a run, needs no engine, and runs code that the run's files name
only with trust=True.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from forescale.checkpoint.choice import at_step, verified
from forescale.checkpoint.reader import STATE, Checkpoint
from forescale.config.compose import arguments
from forescale.config.frozen import thaw
from forescale.config.job import Job, ModelJob
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError, storage_error
from forescale.ground.storage import path_of
from forescale.run.directory import Run, is_hf
from forescale.run.rows import has_checksum, read_rows
from forescale.run.stored import Identity

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from tokenizers import Tokenizer
    from torch import nn

    from forescale.inference.harness.language_model import LanguageModel
    from forescale.train.evaluate import Score
    from forescale.train.preferences import PreferenceScore

J = TypeVar("J", bound=Job)


class RunView:
    """A run directory to read. chosen: the default checkpoint of `model`; None: the newest."""

    def __init__(self, run: Run, chosen: Path | None = None):
        self.run, self.path, self.name, self.chosen = run, run.path, run.name, chosen

    def __repr__(self) -> str:
        return f"RunView({str(self.path)!r})"

    def __fspath__(self) -> str:
        """Return the path that opens the same run, with the same checkpoint."""
        return str(self.chosen or self.path)

    @cached_property
    def config(self) -> TrainJob:
        """The frozen job. The class of the user's own model is not imported."""
        return thaw(TrainJob, self.run.config, trust=True)

    @cached_property
    def identity(self) -> Identity:
        """The content of run.json: dataset (path, hashes, vocab_size, end_of_text) and versions."""
        return self.run.read_identity()

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer of the run's dataset."""
        from forescale.data.tokenizer import load_tokenizer

        return load_tokenizer(self.run.verified_tokenizer())

    @cached_property
    def ends(self) -> list[int]:
        """The ids that end a text: of a document, of a turn of the chats that the model learned,
        and others that imported files declare."""
        from forescale.data.tokenizer import declared_ends
        from forescale.run.finetune import chat_template, kept_template, vocabulary_of_run

        ends: list[int | None] = [self.identity["dataset"]["end_of_text"]]
        if kept_template(self.run):
            turn = chat_template(self.run, vocabulary_of_run(self.run), None).turn_end
            ends.append(self.tokenizer.token_to_id(turn or ""))
        if self.run.imported.is_file():
            ends += declared_ends(self.tokenizer, self.run.read_imported())
        return [*dict.fromkeys(end for end in ends if end is not None)]

    def metrics(self, kind: str | None = "train") -> "pd.DataFrame":
        """Return the rows of one kind (train: one row a step; validation) or of all (None), oldest
        first. Nested fields become columns such as `seconds.compute`."""
        path = self.run.metrics
        if kind and (frame := _columns(path, kind)) is not None:
            return frame
        return _frame(read_rows(path, kind=kind) if kind else read_rows(path))

    def events(self) -> "pd.DataFrame":
        """Return the events of all attempts (starts, saves, hangs, ...), by time (UTC)."""
        import pandas as pd

        frame = _frame(sorted(self.run.read_events(), key=lambda row: row["time"]))
        if len(frame):
            frame["time"] = pd.to_datetime(frame["time"], unit="s", utc=True)
        return frame

    def checkpoints(self) -> list[Checkpoint]:
        """Return all published checkpoints, oldest first, eligible for resuming or not."""
        return [Checkpoint(self.run.checkpoint_path(s)) for s in self.run.checkpoint_steps()]

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        """Return the checkpoint of `step`, by default the chosen or the newest complete one.

        All its bytes are verified. Raises UserError if there is none.
        """
        step = self._job(ModelJob, step=step).step
        if self.chosen is None:
            return at_step(self.run, step)
        checkpoint = verified(self.chosen)
        if step not in (None, checkpoint.position.step):
            problem = f"is of step {checkpoint.position.step}, not {step}"
            raise UserError(str(self.chosen), problem, "leave step out, or name the run")
        return checkpoint

    def model(self, step: int | None = None, trust: bool = False) -> "nn.Module":
        """Return the model with the fp32 weights of a checkpoint, in eval mode, on the CPU.

        step: of the checkpoint; None: the newest. trust: allow running the model class that the
        run's config names. Raises UserError if there is no such checkpoint, or it isn't complete.
        """
        return self.load(self.checkpoint(step), trust)

    def evaluate(
        self,
        data: str | Path | None = None,
        *,
        split: Literal["train", "validation"] = "validation",
        step: int | None = None,
        windows: int | None = None,
        micro_batch: int = 8,
        trust: bool = False,
    ) -> "dict[str, Score | PreferenceScore]":
        """Return the scores of a checkpoint by dataset: those of the run, or `data`, a directory or
        address; each has loss, loss_stderr, perplexity, bits_per_byte, of preferences loss,
        loss_stderr, accuracy and numbers.

        windows: score so many, spread over the split; None: all. Raises UserError if there is no
        such checkpoint, dataset or split.
        """
        from forescale.config.eval import ScoreJob
        from forescale.config.sections.data import CorpusConfig
        from forescale.inference.scoring import datasets_of, score_of

        corpus = CorpusConfig(path=None if data is None else str(data))
        job = self._job(ScoreJob, split=split, windows=windows, micro_batch=micro_batch)
        job.data = corpus
        model = self.model(step, trust).to(best_device())
        return {
            name: score_of(self, self.config, model, dataset, job)[0]
            for name, dataset in datasets_of(self, corpus).items()
        }

    def generate(
        self,
        prompts: str | Sequence[str] = "",
        *,
        num_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = 50,
        stop: Sequence[str] = (),
        seed: int = 1337,
        batch: int = 16,
        step: int | None = None,
        trust: bool = False,
        int8: bool = False,
        **sampling: float,
    ) -> list[str]:
        """Return the texts that a checkpoint writes to the prompts, in their order, as `forescale
        generate` does with these keys.

        sampling: top_p, min_p, repetition_penalty. Raises UserError for a prompt that the model
        can't read, a number out of its range, or int8 where there is none.
        """
        from forescale.config.generate import GenerateJob
        from forescale.inference.generation import Answer, GenerationConfig, complete
        from forescale.inference.question import question_of
        from forescale.models.decoding.sampler import Sampler

        options: dict[str, Any] = {
            "num_tokens": num_tokens,
            "temperature": temperature,
            "top_k": top_k,
        }
        options |= {"stop": stop, "seed": seed, "batch": batch, "prompts": prompts, **sampling}
        job = self._job(GenerateJob, **options)
        sampler = Sampler(job.temperature, job.top_k, job.top_p, job.min_p, job.repetition_penalty)
        config = GenerationConfig(job.num_tokens, sampler, tuple(job.stop))
        answers = [
            Answer(self.tokenizer, question_of(self, prompt), config, job.seed + i)
            for i, prompt in enumerate(job.prompts)
        ]
        model = ready_to_write(self.model(step, trust), int8)
        return [answer.text for answer in complete(model, answers, job.batch)]

    def _job(self, schema: type[J], **values: Any) -> J:
        return arguments(schema, {"target": str(self.path), **values})

    def language_model(
        self, step: int | None = None, *, batch: int = 8, trust: bool = False
    ) -> "LanguageModel":
        """Return the model of a checkpoint as lm_eval takes one:
        `lm_eval.simple_evaluate(model=run.language_model(), tasks=["mine.yaml"])`.

        batch: rows of a forward pass. Raises UserError for a model that continues no text.
        """
        from forescale.config.generate import GenerateJob
        from forescale.inference.harness.language_model import LanguageModel

        batch = self._job(GenerateJob, batch=batch).batch
        return LanguageModel(self, self.model(step, trust), batch=batch)

    def load(self, checkpoint: Checkpoint, trust: bool = False) -> "nn.Module":
        """Return the model with the weights of `checkpoint`; see `model`."""
        from forescale.train.model import build_model

        job = thaw(TrainJob, self.run.config, trust)
        model = build_model(job, self.identity["dataset"]["vocab_size"], draws=False)
        set_weights(model, checkpoint)
        return model.eval()


def open_view(target: str | PathLike[str], root: str | PathLike[str] = "runs") -> RunView:
    """Return the run at `target`, of that name under `root`, or that holds the checkpoint `target`;
    of a Hugging Face directory or a GGUF file, the run in the cache that its model is imported to.

    Raises UserError if there is none.
    """
    path = path_of(target)
    try:
        is_model = is_hf(path)
    except OSError as e:  # such as a name that is too long
        raise storage_error(e) or e from None
    if is_model:
        from forescale.inference.importing import imported  # with torch

        return RunView(imported(path))
    if not (path / STATE).is_file():
        return RunView(Run.existing(path, path_of(root)))
    run = Run(path.resolve().parent.parent)
    if not run.config.is_file():
        problem = "this checkpoint is not in the directory of its run, so its config is unknown"
        raise UserError(str(target), problem, "move it back to RUN/checkpoints")
    return RunView(run, path)


def best_device() -> "torch.device":
    """Return the first GPU, or the CPU if there is none."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ready_to_write(model: "nn.Module", int8: bool = False) -> "nn.Module":
    """Return the model on the best device, as it is fastest in writing text; it is of no other use
    then. int8: with products of 8 bits. Raises UserError if this machine has none."""
    from forescale.models.decoding.products import Int8Product, has_int8, prepare

    device = best_device()
    if int8 and (device.type != "cpu" or not has_int8()):
        where = "a GPU" if device.type != "cpu" else "a torch without oneDNN"
        raise UserError("int8", f"is for a CPU, and this is {where}", "leave it out")
    model = prepare(model.to(device), int8)
    if int8 and not any(
        isinstance(getattr(m, "product", None), Int8Product) for m in model.modules()
    ):
        problem = "is for large matrices of forescale's own models, and this model has none"
        raise UserError("int8", problem, "leave it out")
    return model


def set_weights(model: "nn.Module", checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model, one tensor at a time, adapters merged.

    Raises UserError if the checkpoint is of another model.
    """
    import torch

    saved = model.state_dict(keep_vars=True)
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())  # tied ones once
    tensors |= {name: b for name, b in model.named_buffers() if name in saved}
    checkpoint.expect_shapes({name: tensor.shape for name, tensor in tensors.items()}, merged=True)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(checkpoint.merged(name))


def _columns(path: Path, kind: str) -> "pd.DataFrame | None":
    """Return the rows of a kind as _frame does, read column by column: a million of them take
    seconds. None if they must be looked at one by one: a line without its checksum, which an
    earlier version wrote, a value that is no number, text or section of them, or two types."""
    import pyarrow as pa
    from pyarrow import json as arrow

    begin, mark = b'{"kind": %s, ' % json.dumps(kind).encode(), json.dumps(kind).encode()
    text, known = bytearray(), []
    with open(path, "rb") if path.is_file() else BytesIO() as file:
        for line in file:
            if line.endswith(b"\n") and mark in line:
                if not (line.startswith(begin) and has_checksum(line[:-1])):
                    return None
                text += line[:-21] + b"}\n"
    if not text:
        return None
    if b'"tokens_hash": ' in text:
        known.append(("tokens_hash", pa.uint64()))
    try:
        table = arrow.read_json(
            pa.BufferReader(text),
            arrow.ReadOptions(block_size=len(text)),
            arrow.ParseOptions(explicit_schema=pa.schema(known)),
        )
    except pa.ArrowInvalid:
        return None
    while sections := [f.name for f in table.schema if pa.types.is_struct(f.type)]:
        plain = [name for name in table.column_names if name not in sections]
        table = table.select([*plain, *sections]).flatten()
    if any(pa.types.is_nested(f.type) or pa.types.is_temporal(f.type) for f in table.schema):
        return None
    return table.to_pandas()


def _frame(rows: list[dict]) -> "pd.DataFrame":
    import pandas as pd

    return pd.json_normalize(rows)
