"""The optimizers, one file each with a function `build(config, groups)`.

A group is a dict with "params", "name", "peak_learning_rate", "weight_decay", "eps" and "use_muon"
(true for the hidden matrices, if the optimizer updates whole matrices). Before each step the engine
sets "lr" to peak_learning_rate times the schedule. The specs are in config/sections/optimizer.py.
"""
