"""A job's own steps on pretended GPUs: what would crash, and what a step costs, without a GPU."""
