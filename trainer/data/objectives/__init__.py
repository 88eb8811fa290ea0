"""The objectives other than the prediction of each next token, one file each.

`objective` chooses one; config/sections/objective.py has their names and keys.
"""
