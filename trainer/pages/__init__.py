"""Pages and pictures: one kit for all that draws (`document.py` has the reasons)."""
