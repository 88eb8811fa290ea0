"""Remote files: servers and buckets, a verified cache on the node, listing."""
