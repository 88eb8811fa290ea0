"""What to run: sizes, cells, stages, and how sure the answer would be."""
