"""Metrics of tasks: links from a loss to a metric, predictions in two steps, their backtests."""
