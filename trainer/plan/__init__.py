"""Predict a job before it runs: problems, memory, communication, time, failures."""
