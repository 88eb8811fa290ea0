"""The page of runs, and what it shares with a study's report: skeleton, sections, colours."""
