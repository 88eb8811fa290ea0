"""A trained model without an engine: open, sample, score, export."""
