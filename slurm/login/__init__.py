"""What only the login node does for a job: the code that it freezes, the settings of last time."""
