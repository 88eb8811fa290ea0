"""The mixers: how tokens exchange information, one file each, chosen by `model.mixer`."""
