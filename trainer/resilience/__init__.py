"""Keeps ranks alive: launcher, heartbeats, watchdog; says why a launch ended."""
