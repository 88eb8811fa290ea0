"""The ids of a tokenizer's special tokens that an objective takes: of masks, and of spans.

Invariant: a config is frozen with the ids, so that a resume or an export doesn't look for them.
"""

from dataclasses import replace

from tokenizers import Tokenizer

from forescale.config.sections.objective import MaskedConfig, ObjectiveConfig, SpansConfig
from forescale.data.dataset import Sources
from forescale.data.tokenizer import mask_id, sentinel_ids
from forescale.ground.errors import UserError


def with_special_tokens(objective: ObjectiveConfig, sources: Sources) -> ObjectiveConfig:
    """Return the objective with the ids of the special tokens that the tokenizer has for it. Raises
    UserError if it has no token of an id that is given."""
    if isinstance(objective, MaskedConfig):
        return _with_mask(objective, sources.tokenizer)
    if isinstance(objective, SpansConfig):
        return _with_sentinels(objective, sources)
    return objective


def _with_mask(objective: MaskedConfig, tokenizer: Tokenizer) -> MaskedConfig:
    """Return the objective with the id of the mask token that the tokenizer has. Raises UserError
    if it has no token of the id that is given."""
    token = objective.mask_token
    if token is None:
        return replace(objective, mask_token=mask_id(tokenizer))
    if tokenizer.id_to_token(token) is None:
        problem = f"{token} is no id of the tokenizer, which has {tokenizer.get_vocab_size():,}"
        todo = "leave it out: the tokenizer's own mask token or a new one is taken"
        raise UserError("objective.mask_token", problem, todo)
    return objective


def _with_sentinels(objective: SpansConfig, sources: Sources) -> SpansConfig:
    """Return the objective with the sentinels that the tokenizer has, and the ids that T5 puts
    around them. Raises UserError if it has no token of an id that is given."""
    tokenizer = sources.tokenizer
    for name in ("sentinels", "around"):
        for token in getattr(objective, name) or []:
            if not 0 <= token < sources.vocab_size:
                problem = f"{token} is no id of the tokenizer, which has {sources.vocab_size:,}"
                raise UserError(f"objective.{name}", problem, "leave it out, or give ids of tokens")
    # null stays where the tokenizer has none: a config that was frozen before goes on to fit.
    sentinels, around = objective.sentinels, objective.around
    if sentinels is None:
        sentinels = sentinel_ids(tokenizer) or None
    start = tokenizer.token_to_id("<pad>")
    if around is None and sentinels and start is not None:
        around = [start, sources.end_of_text]
    return replace(objective, sentinels=sentinels, around=around)
