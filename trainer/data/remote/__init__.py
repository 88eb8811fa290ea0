"""Bytes from elsewhere: servers and buckets, a checked cache on the node, what is where."""
