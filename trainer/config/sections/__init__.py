"""The sections of a job: the keys of each, with their help and rules, one file each."""
