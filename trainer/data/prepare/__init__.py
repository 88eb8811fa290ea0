"""Build a dataset from documents, in parallel units that survive a kill."""
