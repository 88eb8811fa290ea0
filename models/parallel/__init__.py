"""Groups of ranks that compute one model together, and what they exchange inside of it."""
