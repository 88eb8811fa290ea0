"""Where tokens are: tables and sinusoids, rotations and their scaling, biases by distance."""
