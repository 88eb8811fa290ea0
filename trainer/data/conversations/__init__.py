"""From lines of prompts and responses to a dataset of conversations."""
