"""The content of a run's small files, as types; directory.py has their names and reads them.

Invariant: what an earlier version wrote has these types, too: a key that it lacks is NotRequired.
"""

from typing import Annotated, Any, NotRequired, cast

from typing_extensions import TypedDict

from forescale.config.tree import build
from forescale.ground.typed import Built, Count, TokenId
from forescale.models.config import ModelConfig


class StoredSource(TypedDict):
    """One dataset of a run: where it was, the hash of what decides its tokens, and that of its
    manifest, which says how it was built."""

    path: str
    identity: str
    corpus_hash: NotRequired[str | None]
    manifest: NotRequired[str]  # an earlier version wrote none


class StoredData(TypedDict):
    """The data of a run. path, identity: None of imported weights, which have no sources either."""

    path: str | None
    identity: str | None
    corpus_hash: NotRequired[str | None]
    vocab_size: TokenId
    end_of_text: TokenId
    sources: dict[str, StoredSource]


class Identity(TypedDict):
    """The content of run.json; run/identity.py writes it."""

    name: NotRequired[str]
    dataset: StoredData
    versions: NotRequired[dict[str, str]]
    git: NotRequired[dict[str, str]]
    tokenizer_sha256: NotRequired[str]  # an earlier version wrote none
    wandb_id: NotRequired[str]
    parameters: NotRequired[Count]
    device: NotRequired[str]


class StoredCheckpoint(TypedDict):
    """A checkpoint that an average is of. table: the sha256 of its files.json."""

    step: Count
    attempt: Count
    table: str


class StoredAverage(TypedDict):
    """The content of averaged.json, which checkpoint/average.py writes."""

    run: str
    checkpoints: list[StoredCheckpoint]


class ReferenceSource(TypedDict):
    """What references were computed from. data: the identity of each source."""

    data: dict[str, str]
    columns: Count


# The content of references.json, which run/references.py writes.
StoredReferences = TypedDict(  # noqa: UP013 - no name of a file's key is one of ours
    "StoredReferences", {"made": ReferenceSource, "values": dict[str, dict[str, str]]}
)


class StoredMirror(TypedDict):
    """The content of mirror.json: the steps that are copied, and why the last try failed."""

    where: str
    steps: list[Count]
    error: str | None


class StoredChat(TypedDict):
    """The content of chat.json, which run/start.py writes."""

    chat_template: str


# The content of imported.json: files of a Hugging Face directory by name.
ImportedFiles = TypedDict(
    "ImportedFiles",
    {
        "config.json": dict[str, Any],
        "generation_config.json": dict[str, Any],
        "tokenizer_config.json": dict[str, Any],
        "special_tokens_map.json": dict[str, Any],
        "chat_template.jinja": str,
    },
    total=False,
)


def _model(value: Any) -> ModelConfig:
    """Return a model as `plain` has it. Raises ValueError for anything else."""
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    model, unknown, wrong = build(ModelConfig, value)
    of_others = [(name, "no key of this version", "") for name in unknown]
    for name, problem, _ in of_others or wrong or model.problems():
        raise ValueError(f"{name}: {problem}")
    return cast(ModelConfig, model)


StoredModel = Annotated[ModelConfig, Built(_model)]
