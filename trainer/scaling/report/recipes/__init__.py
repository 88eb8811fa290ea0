"""Shows recipes that were compared: in the terminal, and as a page with pictures."""
