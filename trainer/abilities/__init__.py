"""What a model can do, measured on small tasks that are made, not read: no data, no network."""
