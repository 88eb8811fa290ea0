"""Read text from the user's files: find the inputs, cut them into units, read documents."""
