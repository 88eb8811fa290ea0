"""What may be said: dataclasses and their rules, the command line read against them."""
