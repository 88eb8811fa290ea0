"""Corpora that are already tokenised: indexed in place, not copied."""
