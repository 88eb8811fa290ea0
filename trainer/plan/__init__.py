"""A job before it runs: problems, memory, communication, time, failures."""
