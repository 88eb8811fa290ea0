"""Analyses of a table of runs: fit, weights, choice of a law, forecasts."""
