"""Text to shards to batches: from the user's files to the tensors of a step."""
