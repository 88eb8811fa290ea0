"""One thin file a verb: reads its job, calls the floors below, prints."""
