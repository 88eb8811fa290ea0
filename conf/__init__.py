"""The Hydra tree of configs, shipped inside the wheel: one file per choice."""
