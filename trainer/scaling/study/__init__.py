"""Runs a study: its directory, its decisions, its cells on this machine or in the queue."""
