"""Tables of vectors beside the vocabulary's: of pairs of tokens, and of each layer's values."""
