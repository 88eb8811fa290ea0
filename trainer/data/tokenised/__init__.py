"""Corpora that hold token ids already: indexed where they lie, not copied."""
