"""What follows the blocks: the table that makes the logits, their loss, and later tokens."""
