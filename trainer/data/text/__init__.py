"""Text out of a user's files: what the inputs hold, cut into units, read as documents."""
