"""Imports a Hugging Face model as a run directory, from whose checkpoint other runs may start.

Invariant: the directory appears complete, by one rename, or not at all. An unsupported part of a
model is refused before anything is written. One tensor is in memory at a time; weights keep their
bits.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeGuard

from forescale.checkpoint.writer import Fragment, unread_weight, write_weights
from forescale.config.compose import compose
from forescale.config.frozen import frozen_file
from forescale.config.schema import TargetConfig, plain
from forescale.config.target import ANY_CLASS
from forescale.config.train import TrainJob
from forescale.config.tree import build
from forescale.data.tokenizer import (
    Vocabulary,
    declared_ends,
    declaring_files,
    framing,
    given_tokenizer,
    mask_id,
    vocabulary_of,
)
from forescale.ground.console import Meter, Progress, progress_display, silent
from forescale.ground.errors import UserError
from forescale.ground.storage import cache_directory, write_checked_json, write_file
from forescale.inference.gguf_file import GgufFile
from forescale.inference.hf_directory import HfDirectory
from forescale.models.config import ModelConfig
from forescale.models.flops import shapes
from forescale.models.hf import FAMILIES, two_sided
from forescale.models.hf.any_class import AnyModel
from forescale.models.hf.config_json import WrongValue, as_text
from forescale.models.hf.loading import has_encoder, sees_both_sides
from forescale.models.hf.pieces import architecture_of, config_of, pieces_of
from forescale.run.directory import GGUF, Run, expect_free, new_run
from forescale.run.identity import code_and_id
from forescale.run.start import versions, with_its_config

_LONGEST = 1 << 15  # tokens, of a class without positions; any number would do
_GENERATION = "generation_config.json"
# Keys of both, of ids that may stand between a source and its answer.
_BEGINNINGS = ("decoder_start_token_id", "pad_token_id", "bos_token_id")
_LONGEST_SOURCE = 512  # of T5's kin


Reads = Literal["both sides", "source", "text"]


@dataclass(frozen=True)
class ImportedModel:
    """A model as a run holds it.

    architecture: the name of its class; parameters: their number, without buffers; vocab_size: its
    ids; longest: the tokens of a row; reads: a text in both directions, a source whose answer it
    writes, or a text that it continues.
    """

    model: ModelConfig | TargetConfig
    parts: list[Fragment]
    architecture: str
    parameters: int
    vocab_size: int
    longest: int
    reads: Reads = "text"


@dataclass(frozen=True)
class Imported:
    """A run that holds imported weights. parameters: their number; bytes: of the weights and of
    stored buffers; reads: see ImportedModel; left_out: tensors that the model has no use for."""

    run: Run
    architecture: str
    parameters: int
    bytes: int
    reads: Reads
    left_out: list[str]


def import_hf(
    source: Path,
    run: Run,
    tokenizer: str | None = None,
    end_of_text: str | None = None,
    progress: Progress = silent,
) -> Imported:
    """Make the run directory of a model, a Hugging Face directory or a GGUF file, and return what
    it holds.

    Args: `tokenizer`, a tokenizer.json or a directory with one; None: that of `source`.
    `end_of_text`: the token that ends a document; None: as data.tokenizer.end_of_text finds it.
    Raises UserError if the run exists, or if a part of the model isn't supported.
    """
    expect_free(run)
    directory = _opened(source)
    imported = _imported(directory)
    parts, architecture = imported.parts, imported.architecture
    vocabulary = _vocabulary(directory, imported.vocab_size, tokenizer, end_of_text)
    job = _job(run, imported, directory, vocabulary)
    numbers, size = imported.parameters, sum(p.data.nbytes for p in parts)
    left_out = [name for name in directory.tensors if two_sided.is_of_sentences(name)]
    result = Imported(run, architecture, numbers, size, imported.reads, left_out)
    meter = Meter(progress, "import weights", size, "bytes")
    with new_run(run, job.run.mode) as new:
        write_weights(new, parts, lambda size: meter(size, 0))
        write_file(new.tokenizer, vocabulary.raw)
        write_checked_json(new.imported, _small_files(directory, vocabulary))
        identity = {
            "name": run.name,
            "tokenizer_sha256": hashlib.sha256(vocabulary.raw).hexdigest(),
            "dataset": {  # the run has no data
                **dict.fromkeys(("path", "identity", "corpus_hash")),
                "sources": {},
                "vocab_size": vocabulary.size,
                "end_of_text": vocabulary.end,
            },
            "imported": {"path": str(source.resolve()), "architecture": architecture},
            "versions": versions(),
            **code_and_id(),
            "parameters": numbers,
        }
        write_checked_json(new.identity, identity)
        write_file(new.config, frozen_file(job))  # the last: with it a directory is a run
    meter.end()
    return result


def imported(source: Path) -> Run:
    """Return the run in the cache that holds the model of a directory or file, imported on first
    use, with a note on stderr. Raises UserError like import_hf."""
    digest = _opened(source).digest()
    name = re.sub(r"[^a-zA-Z0-9_-]", "-", source.resolve().name)
    run = Run(cache_directory() / "imported" / digest[:12] / name)
    if not run.config.is_file():
        try:
            with progress_display() as progress:
                import_hf(source, run, progress=progress)
        except UserError:
            if not run.config.is_file():  # else another command has made it at the same moment
                raise
        print(f"Note: the model of {source} is now the run {run.path}.", file=sys.stderr)
    return run


def _opened(source: Path) -> HfDirectory | GgufFile:
    return GgufFile(source) if source.suffix == GGUF else HfDirectory(source)


def _imported(directory: HfDirectory | GgufFile) -> ImportedModel:
    """Return the model as one of ours, or as a class of transformers if its family is none of ours.
    Raises UserError if it is neither."""
    family = directory.config.get("model_type")
    try:
        # Before the weights of others are looked at, their config may be refused.
        names = directory.tensors if family in [*two_sided.KINDS] else ()
        model = config_of(directory.config, names)
        for key, wrong, _ in build(ModelConfig, plain(model), "model.")[2]:  # as `train` does
            raise ValueError(f"it gives {key}, which {wrong}.")
    except ValueError as e:
        where, problem = str(directory.config_path), str(e).rstrip(".")
        todo = "import another model; nothing was written"
        if isinstance(family, str) and isinstance(directory, HfDirectory):
            if family not in FAMILIES and not isinstance(e, WrongValue):
                return _class_of(directory, problem)
            folder, todo = where.removesuffix("/config.json"), "correct it; nothing was written"
            if family in FAMILIES:
                todo = f"write forescale train NAME model=transformers model.name={folder} "
                todo += "data=dataset data.path=DATA; nothing was written"
        raise UserError(where, problem, todo) from None
    parts, sizes = list(_parts(directory, model)), model.sizes
    architecture = architecture_of(directory.config["model_type"])
    reads: Reads = "source" if model.has_encoder else "text" if model.causal else "both sides"
    numbers, longest = sum(p.data.numel() for p in parts), sizes.max_sequence_length
    return ImportedModel(model, parts, architecture, numbers, sizes.vocab_size, longest, reads)


def _class_of(directory: HfDirectory, problem: str) -> ImportedModel:
    """Return the model as its class of transformers. problem: why it is none of ours."""
    most = len(directory.tensors)  # of whole files, and no pickles
    for key, value in directory.config.items():
        if "layer" in key and type(value) is int and value > most:  # it would be built for hours
            problem = f"its {key} is {value:,}, and its files hold {most:,} weights"
            raise UserError(str(directory.config_path), problem, "correct it; nothing was written")
    model = with_its_config(TargetConfig(ANY_CLASS, {"name": str(directory.path)}))
    try:
        has_source = has_encoder(model.arguments["config"])
        masked = sees_both_sides(directory.config)
        rows: dict[str, Any] = {"sequence_length": 0, "masked": masked, "split": int(has_source)}
        module = AnyModel(**model.arguments, vocab_size=0, **rows)
    except ValueError as e:
        reason, _, todo = str(e).partition("; ")
        problem = f"{problem}; as a class of transformers: {reason}"
        raise UserError(
            str(directory.config_path), problem, f"{todo}; nothing was written"
        ) from None
    weights = {name: p.detach() for name, p in module.named_parameters()}
    numbers, stored = sum(w.numel() for w in weights.values()), module.state_dict()
    weights |= {name: b for name, b in module.named_buffers() if name in stored}
    parts = [
        unread_weight(n, w.shape, 0, w.to("meta"), lambda w=w: w)  # type: ignore[misc]
        for n, w in weights.items()
    ]
    text = module.inner.config.get_text_config()
    longest = module.longest or (_LONGEST_SOURCE if has_source else _LONGEST)
    longest = 2 * longest if has_source else longest
    reads: Reads = "source" if has_source else "both sides" if masked else "text"
    name = type(module.inner).__name__
    return ImportedModel(model, parts, name, numbers, text.vocab_size, longest, reads)


def _parts(directory: HfDirectory | GgufFile, model: ModelConfig) -> Iterator[Fragment]:
    """Yield the weights, each read when it is written. Raises UserError if the files hold others
    than the model has."""
    whole = shapes(model)
    try:
        for piece in pieces_of(directory.config, model, directory.tensors):
            names = [name for name in (piece.source, piece.row) if name]
            stored = [directory.tensors[name] for name in names]
            described = piece.taken(*(one.described() for one in stored))
            read = partial(lambda p, all: p.taken(*(one.read() for one in all)), piece, stored)
            yield unread_weight(piece.name, whole[piece.name], piece.start, described, read)
    except ValueError as e:
        todo = "download it again, or import another model; nothing was written"
        raise UserError(str(directory.path), str(e).rstrip("."), todo) from None


def _vocabulary(
    directory: HfDirectory | GgufFile, most: int, tokenizer: str | None, end: str | None
) -> Vocabulary:
    """Return the model's tokenizer. Raises UserError if there is none, or if it has more tokens
    than the model, which has `most`."""
    where, files = tokenizer or str(directory.path), directory.small_files
    raw = given_tokenizer(tokenizer) if tokenizer else directory.tokenizer
    if tokenizer is None and raw is None:
        problem = "holds no tokenizer.json"
        todo = "give tokenizer=FILE, or make one with transformers: AutoTokenizer, save_pretrained"
        raise UserError(where, problem, todo)
    if raw is None:
        raise UserError("tokenizer", f"{where} names no file", "give a tokenizer.json")
    files = (declaring_files(where) if tokenizer else {}) or files
    vocabulary = vocabulary_of(raw, where, end, files)
    if vocabulary.size > most:
        problem = f"its tokenizer has {vocabulary.size:,} tokens, the model {most:,}"
        raise UserError(where, problem, "give the model's own with tokenizer=FILE")
    return vocabulary


def _small_files(directory: HfDirectory | GgufFile, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the small files; where they declare another end of documents than the command names,
    with that one."""
    files, tokenizer = dict(directory.small_files), vocabulary.load()
    declared = declared_ends(tokenizer, files)
    if declared and declared[0] != vocabulary.end:
        end = {"eos_token": tokenizer.id_to_token(vocabulary.end)}
        files["tokenizer_config.json"] = files.get("tokenizer_config.json", {}) | end
    return files


def _job(
    run: Run, imported: ImportedModel, directory: HfDirectory | GgufFile, vocabulary: Vocabulary
) -> TrainJob:
    """Return the job to freeze: the model, its objective, and defaults that nothing reads."""
    words = [f"run.name={run.name}", f"run.root={run.path.parent}", "schedule=constant"]
    words += ["schedule.warmup=0 steps"]
    words += ["train.steps=1", "train.global_batch=1", "train.micro_batch=1"]
    if imported.reads == "both sides":
        words += ["model.causal=false", "objective=masked"]
        if (mask := mask_id(vocabulary.load())) is not None:
            words += [f"objective.mask_token={mask}"]
    if imported.reads == "source":
        separator = _separator(directory, vocabulary)
        words += ["objective=pairs", f"objective.separator='{separator}'", "objective.framed=true"]
    job = compose(TrainJob, words)
    train = replace(job.train, sequence_length=imported.longest)
    return replace(job, model=imported.model, train=train)


def _separator(directory: HfDirectory | GgufFile, vocabulary: Vocabulary) -> int:
    """Return the token that ends the sources of pairs: the one with which targets begin. Raises
    UserError if the files declare a beginning that is no token."""
    generation = directory.small_files.get(_GENERATION, {})
    places = (directory.config_path, directory.config), (directory.path / _GENERATION, generation)
    for source, config in places:
        for key in (_BEGINNINGS[0], "forced_bos_token_id"):
            token = config.get(key)
            if token is not None and not _is_token(token, vocabulary):
                problem = f"its {key} is {as_text(token)}, no token of its tokenizer"
                raise UserError(str(source), problem, "correct it; nothing was written")
    config = directory.config | generation  # the latter counts in generate() of transformers
    ids = [config.get(key) for key in _BEGINNINGS] + [*range(vocabulary.size)]
    before, behind = framing(vocabulary.load())
    around = {*before, *behind, vocabulary.end}
    return next(i for i in ids if _is_token(i, vocabulary) and i not in around)


def _is_token(value: Any, vocabulary: Vocabulary) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < vocabulary.size
