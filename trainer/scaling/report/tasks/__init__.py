"""Shows metrics of tasks: in the terminal, and as a section of the report."""
