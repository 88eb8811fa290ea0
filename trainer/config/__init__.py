"""The keys of every job as dataclasses, their rules, and the command line read with them."""
