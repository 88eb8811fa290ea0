"""The small dataset of made-up text, which servers and buckets serve here."""

from tests.trainer.data.conftest import dataset, texts

__all__ = ["dataset", "texts"]
