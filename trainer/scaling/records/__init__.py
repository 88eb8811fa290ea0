"""From runs, ours and others', to one table that a fit can read."""
