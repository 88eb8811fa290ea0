"""Read-only views: what runs do, where time went, whether every byte is as written."""
