"""Injected faults on a tiny run, and the judgement of what it survived."""
