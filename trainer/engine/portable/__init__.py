"""A model's state in files that any number of ranks, divided in any way, can read."""
