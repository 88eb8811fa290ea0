"""Trials: is a change better than the base? Pairs of runs, and a test that can't be fooled."""
