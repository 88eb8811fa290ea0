"""Sampling of several rows at once, as a function; see batch.py."""

from torch import Tensor, nn

from forescale.models.decoding.batch import Batch
from forescale.models.decoding.choice import Choice, Draw
from forescale.models.decoding.sampler import Sampler


def generate(
    model: nn.Module,
    tokens_BL: Tensor,
    num_tokens: int,
    sampler: Sampler = Sampler(),  # noqa: B008 - it is frozen
    generator: Draw = None,
    max_context: int | None = None,
    padding_mask_BL: Tensor | None = None,
    source_BS: Tensor | None = None,
    source_mask_BS: Tensor | None = None,
) -> Tensor:
    """Continue each row by num_tokens sampled tokens, an encoder-decoder's at most until it has
    read max_context tokens: (B, L) int64 -> (B, L + num_tokens).

    Args: `model` maps tokens (B, L) to logits (B, L, V); `generator` makes it repeatable: one for
    all rows, or one for each; `max_context`: maximum number of tokens that the model sees (default:
    the model's max_sequence_length, if any); padding_mask (B, L): False at padding, on the left;
    source (B, S): what the encoder of an encoder-decoder reads, and source_mask (B, S), False at
    its padding, on either side. The model runs in eval mode; its mode is restored at the end.
    Raises ValueError for an empty prompt, or a mask or source that is missing or that the model
    doesn't take, and FloatingPointError if no probabilities follow from the logits, such as of NaN.
    """
    was_training = model.training
    model.eval()
    try:
        choice = Choice([sampler] * len(tokens_BL), generator)
        inputs = padding_mask_BL, source_BS, source_mask_BS, num_tokens
        batch = Batch(model, tokens_BL, choice, max_context, *inputs)
        for _ in range(num_tokens):
            if batch.step() is None:
                break
        return batch.tokens.clone()  # outside of inference mode: a loss may read them
    finally:
        model.train(was_training)
