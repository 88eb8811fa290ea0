"""Forecasts of larger budgets from the levels of the known ones and the shape of a study."""
