"""Tables of runs, of our own runs and of exports, in the form that a fit reads."""
