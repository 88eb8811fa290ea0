"""A model divided among ranks: who keeps which part, and how DeepSpeed learns of it."""
