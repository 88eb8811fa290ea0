"""Objectives beside next-token prediction; config/sections/objective.py has their keys."""
