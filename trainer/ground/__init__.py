"""The ground that every room stands on: errors, storage, the terminal, and where ranks meet."""
