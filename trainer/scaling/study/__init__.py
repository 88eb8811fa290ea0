"""Runs a study: its directory, its decisions, its cells here or in the queue."""
