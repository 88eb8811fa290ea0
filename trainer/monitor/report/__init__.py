"""The page of runs, and the picture of their losses."""
