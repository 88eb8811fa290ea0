"""From documents to a published dataset, in parallel units that survive a kill."""
