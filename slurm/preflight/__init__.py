"""What is examined on each node before ranks start, and how the supervisor judges it."""
