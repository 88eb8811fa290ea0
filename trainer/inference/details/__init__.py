"""What else held-out text and random tokens tell of a model than its mean loss."""
