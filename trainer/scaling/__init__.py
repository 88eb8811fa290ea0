"""Scaling laws: from the losses of finished runs to that of a bigger one, with its interval."""
