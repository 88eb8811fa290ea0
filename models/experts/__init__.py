"""A mixture of experts in place of the MLP: the choice, its products, and the load over a step."""
