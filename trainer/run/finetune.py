"""Fine-tuning: the config, the chat template and the length of a run that begins with the weights
of another, and learns from prompts and responses.

Invariant: what fine-tuning changes in the config of the origin stands here, with its source; all
other keys are those of the origin, but for those of one run or one machine.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from forescale.config.duration import Duration
from forescale.config.schema import TargetConfig, plain
from forescale.config.sections.data import ONLY, DataConfig
from forescale.config.sections.lora import LoraConfig
from forescale.config.sections.objective import (
    ObjectiveConfig,
    PairsConfig,
    PreferencesConfig,
    ResponsesConfig,
)
from forescale.config.sections.optimizer import AdamWConfig, OptimizerConfig
from forescale.config.sections.runtime import LaunchConfig, ProfileConfig
from forescale.config.sections.schedule import CosineConfig
from forescale.config.sections.training import OriginConfig
from forescale.config.target import is_any_class
from forescale.config.train import TrainJob
from forescale.data.conversations.template import PLAIN, ChatTemplate
from forescale.data.dataset import Dataset, Sources
from forescale.data.objectives.pairs import separator_id
from forescale.data.tokenizer import Vocabulary, framing
from forescale.ground.errors import UserError
from forescale.ground.foreign import parse_json, read_text
from forescale.ground.storage import read_typed
from forescale.models.config import ModelConfig
from forescale.run.directory import Run
from forescale.run.feed import reads_source, whole_rows_of
from forescale.run.stored import StoredChat

# Alpaca (Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca) fine-tuned LLaMA 7B, whose peak
# was 3e-4 (Touvron et al. 2023, arXiv 2302.13971, table 2), with 2e-5: a fifteenth. Its epochs,
# batch, warm-up and cosine are ours too; and, for imported weights, which have no peak and no batch
# of their own here, its AdamW, without weight decay.
RATE, EPOCHS, BATCH, WARMUP = 1 / 15, 3.0, 128, Duration(3, "percent")
# Alpaca had 52,000 examples, and 1,218 updates. Of few examples its batch would leave a handful, so
# it shrinks to a power of two that leaves so many, where the examples are enough for them.
UPDATES = 100
LENGTH = (
    1024  # columns of a row of imported weights, unless an example is longer; as TRL's trainers
)
# Of preferences: Zephyr 7B (Tunstall et al. 2023, arXiv 2310.16944) learned them by DPO with 5e-7,
# after fine-tuning with 2e-5: a fortieth. Its one epoch, warm-up and optimizer are ours too (the
# recipe dpo/config_full.yaml of github.com/huggingface/alignment-handbook); the batch is that of
# Rafailov et al. 2023 (arXiv 2305.18290, appendix B), and no dropout, as in TRL's DPOTrainer: it
# would differ between the model and its reference.
LATER_RATE, LATER_EPOCHS, LATER_BATCH, LATER_WARMUP = 1 / 40, 1.0, 64, Duration(10, "percent")
IMPORTED = AdamWConfig(learning_rate=2e-5, beta2=0.999, weight_decay=0.0)
# Adapters learn best at ten times the rate of all weights (Schulman 2025,
# thinkingmachines.ai/blog/lora); of imported weights that is the 2e-4 of QLoRA (Dettmers et al.
# 2023, arXiv 2305.14314, table 9), which has no weight decay either.
LORA = 10.0
# Muon updates are orthogonal. The rate of AdamW for the same matrices is about a fifth, the ratio
# of conf/optimizer/muon.yaml. That of tables may be far above.
_OF_MUON = 0.2

_OPEN = 10**9  # steps of a run before its examples are counted: no key may be beyond them yet
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def expect_writer(name: str, config: TrainJob, are_preferences: bool) -> None:
    """Raise UserError if the model of the run `name` can't learn to write responses, or to prefer
    some: it is an encoder; or it has one, and was trained on other rows than pairs."""
    model, objective = config.model, config.objective
    if objective.sees_both_sides:
        problem, todo = "is an encoder, and writes no responses", "objective=masked"
    elif not (reads_source(model) and (are_preferences or objective.kind != "pairs")):
        return
    elif are_preferences:
        problem, todo = "has an encoder, and preferences are rows of a decoder", "objective=pairs"
    else:
        problem, todo = f"was trained with objective={objective.kind}", "objective=pairs"
        todo += r" objective.separator='\t'"
    todo = f"train NAME run.from.run={name} run.from.load=weights {todo} data=dataset data.path=DIR"
    raise UserError("finetune", f"{name} {problem}", f"write forescale {todo}")


def around_source(job: TrainJob, vocabulary: Vocabulary) -> tuple[list[int], list[int]] | None:
    """Return the ids before and behind the source of a pair, with its separator; None for a job
    whose rows are one text."""
    if not isinstance(job.objective, PairsConfig):
        return None
    tokenizer = vocabulary.load()
    before, behind = framing(tokenizer) if job.objective.framed else ([], [])
    separator = separator_id(tokenizer, job.objective.separator or "", vocabulary.end)
    return before, [*behind, separator]


def first_config(
    origin: TrainJob, is_import: bool, are_preferences: bool = False, has_adapters: bool = False
) -> dict[str, Any]:
    """Return the config of a fine-tuning as plain values; `with_examples` sets its length and data.
    is_import: the weights are imported, and the config doesn't say how they were trained.
    has_adapters: only adapters are trained."""
    optimizer = _optimizer(origin, is_import, are_preferences)
    if has_adapters:
        betas: dict[str, Any] = {}
        if type(optimizer) is AdamWConfig:
            betas = {"beta1": optimizer.beta1, "beta2": optimizer.beta2}
        factor = LORA * (_OF_MUON if optimizer.matrices else 1.0)
        rate = optimizer.learning_rate
        optimizer = AdamWConfig(learning_rate=rate, weight_decay=0.0, **betas).scaled(factor)
    batch, each = origin.train.global_batch, origin.train.micro_batch
    most = LATER_BATCH if are_preferences else BATCH
    if is_import or batch > most:
        batch, each = most, math.gcd(most, each)
    model = origin.model
    if isinstance(model, ModelConfig):  # it follows from the rows
        model = replace(model, source_length=None)
    if are_preferences:  # of which each is two rows
        each = each // 2 if each % 2 == 0 else each
        model = _without_dropout(model)
    return plain(
        replace(
            origin,
            run=replace(origin.run, origin=OriginConfig(load="weights")),
            train=replace(
                origin.train,
                steps=_OPEN,
                tokens=None,
                first_length=None,
                length_ramp=None,
                global_batch=batch,
                first_batch=None,
                batch_ramp=None,
                micro_batch=each,
            ),
            data=DataConfig(
                cache=origin.data.cache, workers=origin.data.workers, damaged=origin.data.damaged
            ),
            model=model,
            objective=_objective(origin, are_preferences),
            lora=LoraConfig(),  # of FROM, adapters are merged
            optimizer=optimizer,
            schedule=CosineConfig(LATER_WARMUP if are_preferences else WARMUP),
            launch=LaunchConfig(),
            profile=ProfileConfig(),
            checkpoint=replace(origin.checkpoint, at=[]),
            callbacks=[],
            forecast=None,
            faults=[],
        )
    )


def _objective(origin: TrainJob, are_preferences: bool) -> ObjectiveConfig:
    if reads_source(origin.model) and isinstance(origin.objective, PairsConfig):
        return replace(origin.objective, source=None)
    return PreferencesConfig() if are_preferences else ResponsesConfig()


def _without_dropout(model: Any) -> Any:
    """Return a model's config that drops nothing: the reference of preferences doesn't either."""
    if isinstance(model, ModelConfig):
        return replace(model, dropout=0.0)
    if not is_any_class(model):
        return model
    config = json.loads(model.arguments["config"])
    drops = [
        k for k, v in config.items() if k.endswith(("dropout", "_pdrop", "_dropout_prob")) and v
    ]
    text = json.dumps({**config, **dict.fromkeys(drops, 0.0)}, sort_keys=True)
    return TargetConfig(model.target, {**model.arguments, "config": text})


def default_epochs(are_preferences: bool) -> float:
    return LATER_EPOCHS if are_preferences else EPOCHS


def _optimizer(origin: TrainJob, is_import: bool, are_preferences: bool) -> OptimizerConfig:
    """Return the optimizer of a fine-tuning. For preferences its rate is a fraction of the rate of
    the fine-tuning before."""
    factor = 1.0 if is_import else RATE
    if are_preferences:
        before = {"responses": 1.0, "preferences": 1 / LATER_RATE}
        factor = before.get(origin.objective.kind, factor) * LATER_RATE
    if origin.lora.rank:  # its rate is one of adapters
        factor /= LORA
    old = IMPORTED if is_import else origin.optimizer
    return old.scaled(factor)


def smaller_batch(job: TrainJob, examples: int, epochs: float, least: int) -> TrainJob:
    """Return the job with a batch, of `least` or more, for about UPDATES steps, if it is larger."""
    most = max(1, round(epochs * examples / UPDATES))
    batch = min(job.train.global_batch, max(least, 1 << (most.bit_length() - 1)))
    each = math.gcd(batch, job.train.micro_batch)
    return replace(job, train=replace(job.train, global_batch=batch, micro_batch=each))


def num_rows(job: TrainJob, dataset: Dataset) -> int:
    """Return the rows of an epoch: examples, or what they are packed into."""
    if job.data.packing == "windows":
        return dataset.split("train").num_documents
    sources = Sources({ONLY: dataset})
    (rows,) = whole_rows_of(job, sources, "train", in_training=True).values()
    return int(rows.counts.sum())


def with_examples(job: TrainJob, dataset: Dataset, epochs: float | None) -> TrainJob:
    """Return the job with a dataset; epochs: its length, None if the length is set already. A
    cadence that is longer than an epoch becomes an epoch."""
    job = replace(job, data=replace(job.data, path=str(dataset.path.resolve()), sources={}))
    if epochs is None:
        return job
    rows = num_rows(job, dataset)
    each = max(1, math.ceil(rows / job.train.global_batch))
    steps = max(1, math.ceil(epochs * rows / job.train.global_batch))
    job = replace(job, train=replace(job.train, steps=steps, tokens=None))
    checkpoint, validation = job.checkpoint, job.validation
    if (job.steps_of(checkpoint.every) or 0) > each:
        checkpoint = replace(checkpoint, every=Duration(each))
    if (job.steps_of(validation.every) or 0) > each:
        validation = replace(validation, every=Duration(each))
    return replace(job, checkpoint=checkpoint, validation=validation)


def vocabulary_of_run(run: Run) -> Vocabulary:
    described = run.read_identity()["dataset"]
    raw = run.verified_tokenizer().read_bytes()
    return Vocabulary(raw, described["vocab_size"], described["end_of_text"])


def chat_template(run: Run, vocabulary: Vocabulary, path: str | None) -> ChatTemplate:
    """Return the template in the file `path` (Jinja or a tokenizer_config.json), else that of the
    run's training, else that of its tokenizer, else the plain one. Raises UserError if it can't be
    read."""
    tokenizer = vocabulary.load()
    added = tokenizer.get_added_tokens_decoder().values()
    special = tuple(token.content for token in added if token.special)
    stored = run.read_imported()
    config = stored.get(_CONFIG, {})
    tokens = {"bos_token": "", "eos_token": tokenizer.id_to_token(vocabulary.end) or ""}
    for name, token in config.items():  # of tokenizer_config.json, with or without their flags
        text = token.get("content") if isinstance(token, Mapping) else token
        if name.endswith("_token") and isinstance(text, str) and text:
            tokens[name] = text
    where, source = "the plain chat template", PLAIN
    stored_template = stored.get(_TEMPLATE) or default_template(config.get("chat_template"))
    if template := kept_template(run) or stored_template:
        where, source = f"the chat template of {run.name}", template
    if path is not None:
        where, source = path, _read(path)
    return ChatTemplate(source, where, special, tokens)


def kept_template(run: Run) -> str | None:
    """Return the chat template that a run was trained with; None if it read no conversations."""
    if not run.chat.is_file():
        return None
    template = read_typed(StoredChat, run.chat)["chat_template"]
    return template


def default_template(template: Any) -> str | None:
    """Return the template of tokenizer_config.json; of several, the one named default."""
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read(path: str) -> str:
    todo, file = "give the chat template's file, in Jinja", Path(path).expanduser()
    source = read_text(file, todo=todo)
    if file.suffix != ".json":
        return source
    config = parse_json(source, path)
    template = default_template(config.get("chat_template")) if isinstance(config, dict) else None
    if template is None:
        raise UserError(path, "has no chat_template", todo)
    return template
