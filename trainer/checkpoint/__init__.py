"""Checkpoints: written whole, verified, chosen by lineage, deleted last."""
