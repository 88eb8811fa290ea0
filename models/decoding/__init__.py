"""Writing with a model: what it keeps of the tokens that were read, and which token comes next."""
