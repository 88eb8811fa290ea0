"""Text to shards to batches: everything between a user's files and the tensors of a step."""
