"""Which runs a study trains: sizes, cells, stages, and how precise the prediction will be."""
