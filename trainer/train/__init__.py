"""The training loop of one rank, and what looks at every step."""
