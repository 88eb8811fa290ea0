"""Recipes compared: how many times less compute than the base each of them needs for its loss."""
