"""Generation: the cache of the tokens that were read, and the sampling of the next token."""
