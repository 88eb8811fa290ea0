"""Write a checkpoint as a directory that Hugging Face transformers loads (mapping: models/hf), or
as a file that llama.cpp runs (gguf_export.py).

Invariant: it appears complete, by one rename, or not at all. Its logits equal ours.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from forescale.checkpoint.reader import Checkpoint
from forescale.config.target import is_any_class
from forescale.data.objectives.spans import Spans
from forescale.data.tokenizer import declared_ends, load_tokenizer
from forescale.ground.errors import UserError
from forescale.ground.storage import fsync_path, make_folder, staged
from forescale.inference.gguf_export import architecture_of, write_gguf
from forescale.inference.hf_directory import CONFIG, as_text
from forescale.inference.question import question_of
from forescale.inference.remote_code import CLASSES, MODELING, as_code
from forescale.inference.view import RunView
from forescale.models.adapters import is_adapter
from forescale.models.config import ModelConfig
from forescale.models.flops import shapes
from forescale.models.hf import FAMILIES, family_of, to_hf, two_sided
from forescale.models.hf.loading import auto_class, class_name
from forescale.models.hf.peft_weights import adapters_of_class, adapters_to_hf
from forescale.run.feed import objective_of, reads_source
from forescale.run.finetune import kept_template

# Keys of an imported config.json that don't hold for the exported files.
_OF_THEIR_FILES = ("dtype", "torch_dtype", "transformers_version", "auto_map", "_name_or_path")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_TEMPLATE = "chat_template.jinja"
_MASK = "<mask>"
_PART = 5_000_000_000  # approximate bytes of a weight file
_TASKS = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM"}  # of peft
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def family(view: RunView) -> str:
    """Return the transformers class that the run's model fits, or the class of the file that an
    export brings (remote_code.py). Raises UserError that says why neither is."""
    model = view.config.model
    if is_any_class(model):
        try:
            return class_name(model.arguments["config"], view.config.objective.sees_both_sides)
        except ValueError as e:
            problem, _, todo = str(e).partition("; ")
            raise UserError(view.name, problem, todo) from None
    if not isinstance(model, ModelConfig):
        problem = f"is your own class {model.target}, which transformers doesn't know"
        raise UserError(
            "model._target_", problem, f"load it with forescale.open_run({view.name!r})"
        )
    try:
        if model.has_encoder or not model.causal:
            return two_sided.architecture(model)
        return FAMILIES[family_of(model)].architecture
    except ValueError as e:
        if not model.has_encoder:
            return CLASSES[auto_of(view)]
        problem = f"{str(e).rstrip('.')}; and {MODELING} has no encoder-decoder"
        todo = f"train with those keys, or load it with forescale.open_run({view.name!r})"
        raise UserError("model", problem[0].lower() + problem[1:], todo) from None


def auto_of(view: RunView) -> str:
    """Return the class of transformers that loads the export."""
    model, masked = view.config.model, view.config.objective.sees_both_sides
    if is_any_class(model):
        return auto_class(model.arguments["config"], masked)
    if isinstance(model, ModelConfig) and model.has_encoder:
        return "AutoModelForSeq2SeqLM"
    return "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM"


@dataclass(frozen=True)
class _Exported:
    """What an export writes. files: contents of the small files, by name; tensors: gives the
    weights by name, each read when it is needed."""

    files: dict[str, Any]
    tensors: Callable[[], Iterable[tuple[str, Tensor]]]


def _exported(view: RunView, checkpoint: Checkpoint, dtype: str) -> _Exported:
    architecture = family(view)
    model, kind = view.config.model, _DTYPES[dtype]
    assert isinstance(model, ModelConfig)
    weights = checkpoint.weights()  # with buffers
    checkpoint.expect_shapes({**weights.shapes, **shapes(model.resolved())}, merged=True)
    imported = view.run.read_imported()[CONFIG] if view.run.imported.is_file() else {}

    def content() -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
        if architecture in CLASSES.values():
            return as_code(model, weights)
        return to_hf(model, weights, imported.get("model_type"))

    config = content()[0] | {"dtype": str(kind).removeprefix("torch.")} | _start_of_answers(view)
    # A map, as a loop would hold the last tensor while the next is read.
    tensors = lambda: map(partial(_rounded, kind), content()[1])  # noqa: E731
    return _Exported(_small_files(view, config), tensors)


def export(
    view: RunView,
    checkpoint: Checkpoint,
    to: Path,
    dtype: str = "fp32",
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Write the directory `to`, with the files `beside` in it, and return it.

    It holds config.json, generation_config.json, model.safetensors (several files and an index if
    the model is large), tokenizer.json and tokenizer_config.json. Only one weight file is in memory
    at a time. dtype: fp32, bf16 or fp16, of the weights, each rounded once, after all arithmetic.
    Raises UserError if no family fits, `to` exists or a weight is beyond the range of dtype.
    """
    if is_any_class(view.config.model):
        return _export_class(view, checkpoint, to, _DTYPES[dtype], beside)
    exported = _exported(view, checkpoint, dtype)
    with _new_directory(to) as stage:
        for name, content in exported.files.items():
            (stage / name).write_text(as_text(content), "utf-8")
        if "auto_map" in exported.files[CONFIG]:
            (stage / MODELING).write_bytes((Path(__file__).parent / MODELING).read_bytes())
        (stage / "tokenizer.json").write_bytes(_tokenizer(view))
        for name, data in beside.items():
            (stage / name).write_bytes(data)
        _write_weights(stage, exported.tensors())
    return to


def export_gguf(view: RunView, checkpoint: Checkpoint, to: Path, dtype: str = "fp32") -> Path:
    """Write the file `to`, which llama.cpp runs, and return it.

    dtype: as in `export`, or q8_0, blocks of 32 numbers of 8 bits. Raises UserError if llama.cpp
    doesn't know the model or the split of its tokenizer, and as `export` does.
    """
    if is_any_class(view.config.model):
        problem = "gguf is for our models, and this is a class of transformers"
        todo = "leave it out, and convert the directory with llama.cpp's convert_hf_to_gguf.py"
        raise UserError("format", problem, todo)
    exported = _exported(view, checkpoint, "fp32" if dtype == "q8_0" else dtype)
    files, tokenizer = exported.files, load_tokenizer(view.run.verified_tokenizer())
    # Files that came with imported weights may name the ends elsewhere.
    if files[CONFIG].get("eos_token_id") is None:
        files = {**files, CONFIG: files[CONFIG] | {"eos_token_id": view.ends}}
    architecture_of(files[CONFIG])  # refuse before a folder is made
    _expect_free(to)
    part = to.with_name(f".{to.name}.{os.getpid()}.part")
    make_folder(to.parent)
    try:
        write_gguf(part, view.name, files, tokenizer, exported.tensors, dtype)
        fsync_path(part)
        part.rename(to)
    finally:
        part.unlink(missing_ok=True)
    return to


def _export_class(
    view: RunView, checkpoint: Checkpoint, to: Path, kind: torch.dtype, beside: Mapping[str, bytes]
) -> Path:
    """Write the directory of a class of transformers, as its save_pretrained does."""
    model: Any = view.load(checkpoint)
    for named in model.named_parameters():
        _rounded(kind, named)
    with _new_directory(to) as stage:
        model.to(kind).inner.save_pretrained(stage)
        config = json.loads((stage / CONFIG).read_text("utf-8")) | _start_of_answers(view)
        for name, content in _small_files(view, config).items():
            (stage / name).write_text(as_text(content), "utf-8")
        (stage / "tokenizer.json").write_bytes(_tokenizer(view))
        for name, data in beside.items():
            (stage / name).write_bytes(data)
    return to


def _start_of_answers(view: RunView) -> dict[str, Any]:
    """Return the key for what the decoder of an encoder-decoder begins with, if all its rows began
    so in training."""
    texts = {"gaps": "<extra_id_0>", "prompt": "a"}
    text = texts.get(view.config.objective.source_kind)
    if text is None or not reads_source(view.config.model):
        return {}
    start = question_of(view, text).start
    # Imported weights may begin with two; others begin with one, whatever their origin did.
    return {"decoder_start_token_id": start[0], "forced_bos_token_id": next(iter(start[1:]), None)}


@contextmanager
def _new_directory(to: Path) -> Iterator[Path]:
    """Give a directory that becomes `to` at the end. Raises UserError if that exists."""
    _expect_free(to)
    with staged(to) as stage:
        yield stage
        readable = stage.stat().st_mode & 0o666  # safetensors lets only the owner read its files
        for path in stage.iterdir():
            path.chmod(readable)
            fsync_path(path)


def _expect_free(to: Path) -> None:
    if to.exists():
        other = to.with_name(f"{to.stem}-2{to.suffix}" if to.suffix == ".gguf" else f"{to.name}-2")
        raise UserError(str(to), "already exists", f"choose another name, such as to={other}")


def export_adapters(
    view: RunView, checkpoint: Checkpoint, to: Path, base: str, dtype: str = "fp32"
) -> Path:
    """Write the adapters to the directory `to`, for peft.PeftModel.from_pretrained, and return it.

    base: the directory of the base model, an export of the run that this one began with.

    dtype: as in `export`. Raises UserError if the checkpoint has no adapters, and as `export` does.
    """
    if family(view) in (*CLASSES.values(), two_sided.BERT, two_sided.T5):
        problem = "peft knows no adapters of an encoder, or of a model that comes with its own code"
        raise UserError("adapter", problem, "leave it out: export then writes the whole model")
    job = view.config
    if not any(map(is_adapter, checkpoint.shapes)):
        todo = "leave adapter out: export then writes the whole model"
        raise UserError("adapter", f"{view.name} was trained without adapters", todo)
    state = {name: checkpoint.tensor(name) for name in checkpoint.shapes if is_adapter(name)}
    rank, alpha = job.lora.rank, job.lora.alpha
    if isinstance(job.model, ModelConfig):
        settings, weights = adapters_to_hf(family_of(job.model), job.model, state, rank, alpha)
    else:
        settings, weights = adapters_of_class(state, rank, alpha)
    weights = dict(map(partial(_rounded, _DTYPES[dtype]), weights.items()))
    known = {"peft_type": "LORA", "base_model_name_or_path": base}
    if task := _TASKS.get(auto_of(view)):
        known["task_type"] = task
    options = {"lora_dropout": job.lora.dropout, "inference_mode": True}
    with _new_directory(to) as stage:
        (stage / "adapter_config.json").write_text(
            as_text({**known, **settings, **options}), "utf-8"
        )
        save_file(weights, stage / "adapter_model.safetensors", metadata={"format": "pt"})
    return to


def _rounded(kind: torch.dtype, named: tuple[str, Tensor]) -> tuple[str, Tensor]:
    """Return a named tensor in the number format `kind`. Raises UserError if that makes a number
    infinite."""
    name, tensor = named
    rounded = tensor.to(kind if tensor.is_floating_point() else tensor.dtype)
    if (lost := rounded.isinf() & tensor.isfinite()).any():
        largest, most = torch.finfo(kind).max, float(tensor[lost].abs().max())
        short = next(short for short, each in _DTYPES.items() if each == kind)
        problem = f"{short} holds numbers up to {largest:.6g}, and {name} has one of {most:.6g}"
        raise UserError("dtype", problem, f"give dtype={'bf16' if short == 'fp16' else 'fp32'}")
    return name, rounded


def _write_weights(stage: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write one weight file, or several and an index, under the names that transformers expects.

    The names contain the number of files, so they are renamed at the end.
    """
    parts: list[list[str]] = []
    total = 0
    for part in _parts(tensors):
        parts.append(list(part))
        total += sum(t.nbytes for t in part.values())
        save_file(part, stage / f"part-{len(parts)}", metadata={"format": "pt"})
        part.clear()
    if len(parts) == 1:
        (stage / "part-1").rename(stage / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        (stage / f"part-{number}").rename(stage / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (stage / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield groups of tensors of at most _PART bytes, or a single larger tensor."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if part and size + tensor.nbytes > _PART:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
        del tensor
    yield part


def _added(view: RunView) -> list[str]:
    """Return names for the ids that masks or spans add behind the tokenizer's, in their order."""
    known, tokenizer = view.identity["dataset"]["vocab_size"], view.tokenizer
    if tokenizer.get_vocab_size() != known:  # a name would get another id
        return []
    if view.config.objective.sees_both_sides:
        has_mask = _mask_token(view) is not None or tokenizer.token_to_id(_MASK) is not None
        return [] if has_mask else [_MASK]
    if view.config.objective.source_kind != "gaps":
        return []
    spans = objective_of(view.config, known)
    assert isinstance(spans, Spans)
    return [f"<extra_id_{i}>" for i in range(spans.extra_ids)]


def _mask_token(view: RunView) -> int | None:
    """Return the id of the tokenizer that masks have; None: an id behind it, or no masks."""
    token: int | None = getattr(view.config.objective, "mask_token", None)
    return token


def _tokenizer(view: RunView) -> bytes:
    """Return tokenizer.json: that of the run, with the names of _added."""
    path = view.run.verified_tokenizer()
    if not (names := _added(view)):
        return path.read_bytes()
    tokenizer = load_tokenizer(path)
    tokenizer.add_special_tokens(names)
    return tokenizer.to_str().encode()


def _small_files(view: RunView, config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the files beside the weights and tokenizer.json, by file name.

    For weights that descend from imported ones, these are the imported files, updated by `config`:
    they know the special tokens and the chat template.
    """
    end = view.identity["dataset"]["end_of_text"]
    name = view.tokenizer.id_to_token(end)
    # In training the end-of-text token precedes every document, so it is the bos token here.
    taught = view.ends if len(view.ends) > 1 else end
    ends = {"bos_token_id": end, "eos_token_id": taught}
    keys = ("decoder_start_token_id", "forced_bos_token_id")
    start = {key: config[key] for key in keys if key in config}
    if start:  # with which transformers fills labels up
        ends["pad_token_id"] = end
    files: dict[str, Any] = {
        CONFIG: config | ends,
        "generation_config.json": ends | {"pad_token_id": end} | start,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": name,
            "eos_token": name,
            "pad_token": name,
            "clean_up_tokenization_spaces": False,  # it would drop spaces that are in the text
            "model_max_length": view.config.train.sequence_length,
        },
    }
    if (token := _mask_token(view)) is not None:
        files["tokenizer_config.json"]["mask_token"] = view.tokenizer.id_to_token(token)
    elif _MASK in _added(view):
        files["tokenizer_config.json"]["mask_token"] = _MASK
    if template := kept_template(view.run):
        files[_TEMPLATE] = template
    if not view.run.imported.is_file():
        return files
    imported = view.run.read_imported()
    before = imported[CONFIG]
    kinds = (before.get("model_type"), config["model_type"])
    if kinds[0] != kinds[1] and kinds != ("mt5", "t5"):  # of which one class computes both
        return files
    settings = {key: value for key, value in before.items() if key not in _OF_THEIR_FILES}
    sizes = {key: value for key, value in config.items() if key not in _SPECIAL}
    if template:
        imported[_TEMPLATE] = template
    if start:
        generation = imported.get("generation_config.json", files["generation_config.json"])
        imported["generation_config.json"] = generation | start
    declared = declared_ends(view.tokenizer, imported)
    if {*view.ends} > {*declared}:  # others were taught
        settings["eos_token_id"] = taught
        generation = imported.get("generation_config.json", files["generation_config.json"])
        imported["generation_config.json"] = generation | {"eos_token_id": taught}
    if declared[:1] != [end]:
        tokens = imported.get("tokenizer_config.json", files["tokenizer_config.json"])
        imported["tokenizer_config.json"] = tokens | {"eos_token": name}
    return {**files, **imported, CONFIG: settings | sizes}
