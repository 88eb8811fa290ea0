"""From a table to an answer: the law, its sensitivity, forecasts, scores."""
