"""Texts that a model in training writes. (On ranks: tests/distributed/test_abilities.py.)"""

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models

from forescale.engine.ranks import ALONE
from forescale.train.samples import Samples

WORDS = ["<end>", "▁once", "▁upon", "▁there", "s"]


class Counting:
    """An engine whose model says that each word follows the one before, with certainty."""

    world = SimpleNamespace(
        columns=ALONE, mesh=SimpleNamespace(pieces=1), from_main=ALONE.from_main
    )

    def logits(self, tokens_BL):
        following = (tokens_BL + 1) % len(WORDS)
        return 100.0 * torch.nn.functional.one_hot(following, len(WORDS)).float()


def test_each_prompt_goes_on_to_its_end_with_the_spaces_between_words():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    tokenizer.decoder = decoders.Metaspace()
    prompts = [[0, 1], [0, 1, 2, 3], [0, 1]]
    samples = Samples(prompts, 9, tokenizer.decode, 0, Counting(), lambda at: None)
    assert samples() == [" upon theres", "s", " upon theres"]
