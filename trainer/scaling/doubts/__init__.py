"""What makes the numbers of a fit doubtful, said in sentences."""
